"""A model that loads its weights the way vLLM's models do, and its trainer's tensors."""

import pytest

from tests.support.fused_model import FusedModel, trainer_tensors


@pytest.fixture
def fused_model():
    return FusedModel


@pytest.fixture
def tensors():
    return trainer_tensors
