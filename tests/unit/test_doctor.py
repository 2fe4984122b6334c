"""`oapl doctor --weights` before its engine starts."""

from types import SimpleNamespace

import pytest
import torch

from oapl_engine import doctor


class EngineStartedError(Exception):
    """Nothing more is to be seen."""


def test_the_policy_is_on_the_host_when_the_engine_starts(monkeypatch):
    """The engine asks for most of the card, which a policy there would not leave free."""
    loaded = []

    def load(model, train, device=None):
        loaded.append(device or torch.device("cuda"))
        return SimpleNamespace()

    def start(folder, scratch):
        raise EngineStartedError

    monkeypatch.setattr(doctor, "load_policy", load)
    monkeypatch.setattr(doctor, "_open_session", start)
    with pytest.raises(EngineStartedError):
        doctor.check_weights("model")
    assert loaded == [torch.device("cpu")]
