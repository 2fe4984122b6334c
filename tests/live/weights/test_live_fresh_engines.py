"""After each of ten publishes the live engine says what a freshly loaded engine says with that version's checkpoint."""

import pytest

from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.protocol import Sampling
from oapl_engine.rollout.session import EngineSession
from oapl_engine.samples import Prompt

pytestmark = [pytest.mark.live, pytest.mark.slow]


def greedy_of_fresh_engine(folder, prompts, new_tokens):
    options = EngineOptions(str(folder), max_model_len=128, kv_cache_mb=64, takes_updates=False)
    with EngineSession(options, folder / "engine.log") as session:
        how = Sampling(temperature=0, max_new_tokens=new_tokens, ignore_stops=True)
        groups = session.generate([Prompt(str(i), p, "test") for i, p in enumerate(prompts)], 1, how)
    return [group[0].ids().tolist() for group in groups]


def test_ten_versions_are_token_exact_with_fresh_engines(make_rig, tmp_path, figure):
    rig = make_rig()
    live = []
    for version in range(10):
        rig.change()
        rig.publish()
        live.append(rig.greedy_of_engine())
        rig.model.save_pretrained(tmp_path / str(version))
    same = 0
    for version, outputs in enumerate(live):
        fresh = greedy_of_fresh_engine(tmp_path / str(version), rig.prompts, len(outputs[0]))
        same += fresh == outputs
        assert fresh == outputs, f"version {version}"
    figure("versions token-exact with a fresh engine, 16 prompts each", same)
    assert live[0] != live[-1]
