"""EvaluationConfig: counts, files, comparison."""

import json

import numpy as np
import pytest

from oapl_engine.config import EvaluationConfig
from oapl_engine.evaluation.evaluate import append_evaluation, compare, evaluate, read_problems
from oapl_engine.rewards import Verdict
from oapl_engine.samples import Prompt

PROMPTS = [Prompt(f"p{i}", np.array([i], np.int32), "sort", {"answer": i}) for i in range(3)]
SETTINGS = EvaluationConfig(n=4, k=[1, 4], temperature=0.7)


def generate(prompts, n, temperature):
    assert temperature == 0.7
    return [[[int(p.token_ids[0]), sample] for sample in range(n)] for p in prompts]


def verify(pairs):
    """Problem i: its first i samples are right; sample 3 has no verdict; sample 2 has partial credit."""
    verdicts = []
    for prompt, (problem, sample) in pairs:
        assert prompt.record["answer"] == problem
        if sample == 3:
            verdicts.append(Verdict("invalid", None, {"reason": "late"}))
        else:
            verdicts.append(Verdict("scored", 1.0 if sample < problem else 0.99))
    return verdicts


def run(step=0, settings=SETTINGS, **functions):
    functions = {"generate": generate, "verify": verify} | functions
    return evaluate(PROMPTS, **functions, settings=settings, step=step, version=step // 2, seed=5)


def test_counts_each_problem_and_takes_neither_partial_credit_nor_invalid_as_correct():
    result = run()
    assert result.problems == ("p0", "p1", "p2")
    assert result.correct == (0, 1, 2)
    assert result.invalid == (1, 1, 1)
    assert result.pass_at_k(1)[0] == pytest.approx(0.25)
    assert result.pass_at_k(4)[0] == pytest.approx(2 / 3)


def test_files_have_the_schema_of_the_contract(tmp_path):
    append_evaluation(run(0), SETTINGS.k, tmp_path)
    append_evaluation(run(6), SETTINGS.k, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    keys = ["step", "version", "task", "n", "k", "pass_at_k", "standard_error", "seed", "temperature"]
    assert [list(row) for row in rows] == [keys] * 4
    assert [(r["step"], r["version"], r["k"]) for r in rows] == [(0, 0, 1), (0, 0, 4), (6, 3, 1), (6, 3, 4)]
    assert rows[0]["pass_at_k"] == pytest.approx(0.25)
    assert rows[0]["standard_error"] == pytest.approx(0.25 / np.sqrt(3))
    append_evaluation(run(6), SETTINGS.k, tmp_path)  # as after a kill and a resume
    assert read_problems(tmp_path) == [run(0), run(6)]


def test_the_error_of_a_single_problem_is_null(tmp_path):
    one = evaluate(PROMPTS[:1], generate, verify, SETTINGS, step=0, version=0, seed=0)
    append_evaluation(one, [1], tmp_path)
    assert json.loads((tmp_path / "eval.jsonl").read_text())["standard_error"] is None


def test_compare_pairs_the_same_problems_only():
    better = run(9, verify=lambda pairs: [Verdict("scored", 1.0)] * len(pairs))
    mean, error = compare(run(0), better)
    assert mean == pytest.approx(0.75)
    assert error == pytest.approx(0.25 / np.sqrt(3))
    other = evaluate(PROMPTS[::-1], generate, verify, SETTINGS, step=1, version=0, seed=0)
    with pytest.raises(ValueError, match="steps 0 and 1 are not on the same problems"):
        compare(run(0), other)


def test_short_returns_are_refused():
    with pytest.raises(ValueError, match=r"not 3 of 4"):
        run(generate=lambda prompts, n, temperature: generate(prompts[1:], n, temperature))
    with pytest.raises(ValueError, match=r"not 3 of 4"):
        run(generate=lambda prompts, n, temperature: generate(prompts, n - 1, temperature))
    with pytest.raises(ValueError, match=r"11 verdicts on 12"):
        run(verify=lambda pairs: verify(pairs)[1:])
    with pytest.raises(ValueError, match="held_out"):
        evaluate([], generate, verify, SETTINGS, step=0, version=0, seed=0)
