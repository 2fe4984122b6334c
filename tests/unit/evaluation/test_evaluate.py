"""Evaluation: counts, files, comparison."""

import json

import numpy as np
import pytest

from oapl_engine.errors import RunError
from oapl_engine.evaluation.evaluate import (
    append_evaluation,
    compare,
    compare_rewards,
    evaluate,
    read_problems,
    warn_of_scale,
)
from oapl_engine.inference.protocol import Sample, Sampling
from oapl_engine.rewards import Verdict
from oapl_engine.samples import Prompt

PROMPTS = [Prompt(f"p{i}", np.array([i], np.int32), "sort", {"answer": i}) for i in range(3)]
KS = [1, 4]


class FakeSession:
    """Answers as an EngineSession: sample s of problem i is the token ids [i, s].

    Problem i: its first i samples are right; sample 3 has no verdict; the others have partial credit.
    """

    def generate(self, prompts, n, sampling):
        assert sampling.temperature == 0.7
        return [[self._sample(int(prompt.token_ids[0]), s) for s in range(n)] for prompt in prompts]

    def verify(self, pairs):
        verdicts = []
        for prompt, token_ids in pairs:
            problem, sample = map(int, token_ids)
            assert prompt.record["answer"] == problem
            if sample == 3:
                verdicts.append(Verdict("invalid", None, {"reason": "late"}))
            else:
                verdicts.append(Verdict("scored", 1.0 if sample < problem else 0.99))
        return verdicts

    def _sample(self, problem, number):
        ids = np.array([problem, number], np.int32)
        return Sample(number, ids.tobytes(), np.zeros(2, np.float32).tobytes(), "stop", ((0, 0, 2),))


def run(step=0, session=None, prompts=PROMPTS, correct=1.0, max_invalid_share=0.25):
    limits = {"correct": correct, "max_invalid_share": max_invalid_share}
    sampling = Sampling(temperature=0.7)
    return evaluate(session or FakeSession(), prompts, 4, sampling, **limits, step=step, version=step // 2, seed=5)


def test_partial_credit_and_invalid_samples_are_not_correct():
    result = run()
    assert result.problems == ("p0", "p1", "p2")
    assert result.correct == (0, 1, 2)
    assert result.invalid == (1, 1, 1)
    assert result.pass_at_k(1)[0] == pytest.approx(0.25)
    assert result.pass_at_k(4)[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("correct", "warned"), [(1.0, False), (0.99, True), (0.5, True)])
def test_rewards_on_a_larger_scale_are_said(correct, warned):
    """As a percentage, of which 1 would count as correct."""
    lines = warn_of_scale(run(correct=correct), correct)
    assert bool(lines) == warned
    assert all(f"evaluation.correct = {correct:g} counts as correct" in line for line in lines)


def test_rewards_outside_0_to_1_have_a_mean_and_a_threshold():
    """pass@k counts what reaches evaluation.correct; the mean reward is told whatever the scale."""

    class Distance(FakeSession):
        def verify(self, pairs):
            return [Verdict("scored", -5.0 + problem + sample) for problem, sample in (ids for _, ids in pairs)]

    result = run(session=Distance(), correct=-1.0)
    assert result.correct == (0, 1, 2)
    assert result.reward == (-3.5, -2.5, -1.5)
    assert result.mean_reward() == pytest.approx((-2.5, 1 / np.sqrt(3)))
    assert "reward -2.5000 ± 0.5774" in result.describe()
    better = run(9, session=FakeSession())
    assert compare_rewards(result, better)[0] == pytest.approx(np.mean(better.reward) + 2.5)


def test_too_many_invalid_responses_are_no_evaluation():
    """A quarter is invalid: at the limit that is told, above it nothing is returned that could be kept."""
    assert run(max_invalid_share=0.25).invalid_share == 0.25
    assert "25.0% invalid" in run().describe()
    with pytest.raises(RunError, match=r"25% of the responses got no reward .*late"):
        run(max_invalid_share=0.2)


def test_files_have_the_schema_of_the_contract(tmp_path):
    append_evaluation(run(0), KS, tmp_path)
    append_evaluation(run(6), KS, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    keys = ["step", "version", "task", "n", "k", "pass_at_k", "standard_error"]
    keys += ["reward_mean", "reward_error", "invalid_share", "seed", "temperature"]
    assert [list(row) for row in rows] == [keys] * 4
    assert [(r["step"], r["version"], r["k"]) for r in rows] == [(0, 0, 1), (0, 0, 4), (6, 3, 1), (6, 3, 4)]
    assert rows[0]["pass_at_k"] == pytest.approx(0.25)
    assert rows[0]["standard_error"] == pytest.approx(0.25 / np.sqrt(3))
    append_evaluation(run(6), KS, tmp_path)  # as after a kill and a resume
    assert read_problems(tmp_path) == [run(0), run(6)]


def test_the_error_of_a_single_problem_is_null(tmp_path):
    one = run(prompts=PROMPTS[:1])
    append_evaluation(one, [1], tmp_path)
    assert json.loads((tmp_path / "eval.jsonl").read_text())["standard_error"] is None


def test_compare_pairs_the_same_problems_only():
    class Better(FakeSession):
        def verify(self, pairs):
            return [Verdict("scored", 1.0)] * len(pairs)

    better = run(9, Better())
    mean, error = compare(run(0), better)
    assert mean == pytest.approx(0.75)
    assert error == pytest.approx(0.25 / np.sqrt(3))
    other = run(1, prompts=PROMPTS[::-1])
    with pytest.raises(ValueError, match="steps 0 and 1 are not on the same problems"):
        compare(run(0), other)


def test_short_returns_are_refused():
    class FewerGroups(FakeSession):
        def generate(self, prompts, n, sampling):
            return super().generate(prompts[1:], n, sampling)

    class FewerSamples(FakeSession):
        def generate(self, prompts, n, sampling):
            return super().generate(prompts, n - 1, sampling)

    class FewerVerdicts(FakeSession):
        def verify(self, pairs):
            return super().verify(pairs)[1:]

    for session in (FewerGroups(), FewerSamples()):
        with pytest.raises(ValueError, match=r"not 3 of 4"):
            run(session=session)
    with pytest.raises(ValueError, match=r"11 verdicts on 12"):
        run(session=FewerVerdicts())
    with pytest.raises(ValueError, match="held_out"):
        run(prompts=[])


def test_counts_outlive_a_kill_in_the_middle_of_a_line(tmp_path):
    append_evaluation(run(0), KS, tmp_path)
    for name in ("eval.jsonl", "eval_problems.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"step": 6, "ver')
    assert read_problems(tmp_path) == [run(0)]
    append_evaluation(run(6), KS, tmp_path)
    assert read_problems(tmp_path) == [run(0), run(6)]
