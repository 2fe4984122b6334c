"""WeightSync's probe prompts, without an engine."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.protocol import Sample, Sampling
from oapl_engine.orchestrator.weight_sync import PROBE_TOKENS, WeightSync
from oapl_engine.samples import Prompt


class FakeSession:
    """Answers every prompt with as many tokens as it may."""

    control = None
    incarnation = 0

    def __init__(self):
        self.engine = SimpleNamespace(options=EngineOptions("model"))
        self.after_restart = []

    def generate(self, prompts, n, sampling):
        tokens = np.full(sampling.max_new_tokens, 5, "<i4")
        return [[Sample(0, tokens.tobytes(), b"", "length", ())] for _ in prompts]

    def counters(self):
        return {"incarnation": 0, "tokens_generated": 0}

    def take_ungrouped_tokens(self):
        return 0


@pytest.mark.parametrize("longest", [8, 16_384])
def test_probes_are_short_however_long_responses_are(make_run, longest):
    """Both sides score them at each publish, and for the first one the trainer is on the host."""
    run = make_run()
    policy = SimpleNamespace(matmul_dtype=torch.float32)
    prompts = [Prompt("p", np.array([3, 4], np.int32), "t")]
    sync = WeightSync(run, FakeSession(), policy, None, prompts, Sampling(max_new_tokens=longest))
    assert sync.probe_token_ids == [[3, 4] + [5] * min(longest, PROBE_TOKENS)]
    assert json.loads((run.directory / "probe.json").read_text()) == sync.probe_token_ids
    assert PROBE_TOKENS == 128
    sync.close()
