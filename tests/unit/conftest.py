"""Fixtures that several folders of unit tests share."""

import pytest

from tests.support.models import save_model_folder


@pytest.fixture
def model_folder(tmp_path):
    """model_folder(name): a folder in Hugging Face layout, a tiny model with a word-level tokenizer."""
    return lambda name="llama", words=60: save_model_folder(tmp_path / f"model_{name}", name, words)
