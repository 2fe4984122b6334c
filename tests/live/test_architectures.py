"""Every architecture of benchmarks/tiny_architectures.json: 0.6 s each, a minute and a half in all."""

import json

import pytest

from benchmarks import architectures
from benchmarks._tiny_architectures import ARCHITECTURES
from benchmarks.docs import DATA

COMMITTED = json.loads((DATA / "architectures.json").read_text())["findings"]


@pytest.mark.live
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packing_mode_of_every_architecture(name):
    """The committed one, within 1e-4 nats of the model's own eager attention."""
    finding = architectures.measure(name)
    assert architectures.is_right(finding), finding
    assert (finding.mode, finding.attention) == (COMMITTED[name]["mode"], COMMITTED[name]["attention"])
