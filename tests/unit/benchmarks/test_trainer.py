"""`python -m benchmarks trainer` at one round: the same gradients with less memory. Its times are not judged here."""

import json

import pytest

from benchmarks import trainer


@pytest.mark.slow
def test_one_round(tmp_path, capsys, figure):
    trainer.main(["--rounds", "1", "--json", str(tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert set(rows) == set(trainer.KINDS)
    shown = capsys.readouterr().out
    assert all(f"\n| {kind} | " in shown for kind in rows)
    padded, shared = rows["padded, all logits"], rows["shared"]
    assert shared["gradient_difference"] <= 5e-6
    assert shared["extra_mb"] <= 0.5 * padded["extra_mb"]
    figure(
        "memory of shared prompts against padding with all logits", round(shared["extra_mb"] / padded["extra_mb"], 3)
    )
