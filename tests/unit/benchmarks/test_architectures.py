"""Each of the tiny models is trained as it is, or refused; all of them: tests/live/test_architectures.py."""

import json
import logging

import pytest

from benchmarks import architectures
from benchmarks._tiny_architectures import ARCHITECTURES
from benchmarks.docs import DATA
from tests.support.fresh_memory import nan_in_fresh_memory

QUICK = {
    "gemma2 softcaps": "share",  # transformers' sdpa drops the cap
    "gpt_oss windows": "share",  # sinks in the softmax
    "stablelm qk norm": "share",  # its layers drop keyword arguments
    "phi dropout": "share",  # and a bias of the head
    "opt dropout": "share",  # functional dropout of a layer that checkpoints
    "mixtral window and jitter": "share",
    "gptj": "one by one",
    "falcon_h1 scaled": "one by one",
    "llama4_text": "one by one",
    "hyperclovax scaled": "refused",
}


@pytest.mark.parametrize("name", QUICK)
def test_models_are_trained_as_they_are_or_refused(name, caplog):
    """Log-probs within 1e-4 nats of eager attention, gradients within 1e-3; ConfigError alone is raised."""
    with nan_in_fresh_memory(), caplog.at_level(logging.ERROR):
        finding = architectures.measure(name)
    assert finding.mode == QUICK[name]
    assert architectures.is_right(finding)


def test_the_committed_findings_are_of_every_architecture():
    findings = json.loads((DATA / "architectures.json").read_text())["findings"]
    assert list(findings) == list(ARCHITECTURES)
    assert all(architectures.is_right(architectures.Finding(**finding)) for finding in findings.values())


def test_a_difference_is_not_right():
    right = architectures.Finding("share", nats=1e-6, gradient=1e-6)
    assert architectures.is_right(right)
    for nats, gradient in ((2e-4, 1e-6), (1e-6, 2e-3), (float("nan"), 1e-6), (1e-6, float("nan"))):
        assert not architectures.is_right(architectures.Finding("share", nats=nats, gradient=gradient))
    assert not architectures.is_right(architectures.Finding("share"))
