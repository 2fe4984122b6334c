"""`oapl eval`: several models on the same problems by live engines, stopped and resumed."""

import json
import re

import pytest

pytestmark = pytest.mark.live


def test_two_models_are_compared_and_a_stop_is_resumed(oapl, refused, micro_model, tmp_path):
    fresh = tmp_path / "untrained"
    assert oapl("sft", "recipes/micro_sft.toml", "--train.steps", 1, "--model.out", fresh).returncode == 0
    out = tmp_path / "out"
    words = ["--task", "micro:sort", "--n", 4, "--data.held_out", 12, "--data.template", "raw"]
    words += ["--sampling.max_new_tokens", 8, "--out", out, "--run.threads", 1]
    done = oapl("eval", fresh, micro_model, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"done: models=2 problems=12 n=4 out={out}"
    assert (out / "pass_at_k.svg").stat().st_size > 0
    table = {row[0]: row[1:] for row in re.findall(r"│ +(.+?) +│ +(\S+) ± (\S+) +│", done.stdout)}
    assert table["untrained"] == ("0.0000", "0.0000")
    assert float(table["micro"][0]) == float(table["− untrained"][0]) > 0.1

    kept = out / "micro" / "eval_problems.jsonl"
    lines = kept.read_text().splitlines()
    kept.write_text("".join(line + "\n" for line in reversed(lines[:5])))
    again = oapl("eval", fresh, micro_model, *words)
    assert "micro: 7 problems x 4 samples" in again.stderr
    assert "untrained: " not in again.stderr
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {r["problem"] for r in rows} == {json.loads(line)["problem"] for line in lines}
    assert len(rows) == 12
    refused(["another template", "--out"], "eval", micro_model, *words, "--data.template", "{question}")
    refused(["another temperature", "--out"], "eval", micro_model, *words, "--evaluation.temperature", 0.5)
