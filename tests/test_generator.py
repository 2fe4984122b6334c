"""What the generator tells its user beside events."""

import json
from types import SimpleNamespace

from oapl_engine.generator import list_dropped


def test_prompts_over_the_limit_are_counted_and_listed(tmp_path):
    said = []
    learner = SimpleNamespace(run_dir=tmp_path, display=SimpleNamespace(say=said.append))
    list_dropped(SimpleNamespace(dropped={}), 64, learner)
    assert (said, list(tmp_path.iterdir())) == ([], [])
    list_dropped(SimpleNamespace(dropped={"p7": 90, "p9": 71}), 64, learner)
    assert json.loads((tmp_path / "dropped_prompts.json").read_text()) == {"p7": 90, "p9": 71}
    assert "2 prompts over data.max_prompt_tokens = 64" in said[0]
