"""`oapl doctor RUN`: each rule fires on the metrics that it is for, and is silent on those of a healthy run."""

import json

import pytest
import tomli_w

from oapl_engine.config import load_recipe
from oapl_engine.config_file import to_toml
from oapl_engine.report.diagnosis import diagnose
from oapl_engine.rollout_log.log import RolloutLog
from tests.conftest import ROOT
from tests.support.rollouts import plain_group

HEALTHY = {
    "loss": 0.2, "reward/all/mean": 0.5, "entropy/all/mean": 0.9, "log_ratio/mean": -0.02, "log_ratio/std": 0.2,
    "beta2": 0.1,
    "filters/zero_variance": 0.3, "is_truncated/mean": 0.02, "seq_len/mean": 8.0, "logprob_gap/mean": 2e-6,
    "time/idle": 0.01, "time/step": 0.1,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    def make(change=lambda step: {}, **recipe):
        words = [word for name, value in recipe.items() for word in (f"--{name.replace('__', '.')}", str(value))]
        (tmp_path / "config.toml").write_text(
            tomli_w.dumps(to_toml(load_recipe(ROOT / "recipes" / "micro.toml", words)))
        )
        rows = [HEALTHY | {"step": s + 1, "off_policy/mean": s % 16} | change(s) for s in range(64)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return make


def test_a_healthy_run(run, oapl):
    assert diagnose(run()) == []
    assert oapl("doctor", run()).stdout == "doctor: nothing stands out\n"


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("disagree on log-probs", lambda s: {"logprob_gap/mean": 0.01}),
        ("numbers that are not finite", lambda s: {"loss": None} if s > 40 else {}),
        ("many responses no reward", lambda s: {"reward/all/invalid": 0.08}),
        ("too hard", lambda s: {"filters/zero_variance": 0.9, "reward/all/mean": 0.02}),
        ("too easy", lambda s: {"filters/zero_variance": 0.9, "reward/all/mean": 0.98}),
        ("cut off", lambda s: {"is_truncated/mean": 0.5}),
        ("too hot", lambda s: {"log_ratio/mean": -2.0 if s == 30 else -0.02}),
        ("too hot", lambda s: {"reward/all/mean": 0.5 if s < 30 else 0.1}),
        ("too hot", lambda s: {"entropy/all/mean": 0.9 if s < 30 else 0.1, "reward/all/mean": 0.5 if s < 30 else 0.45}),
        ("β2 is too small", lambda s: {"beta2": 1e-3}),
        ("β2 is too large", lambda s: {"beta2": 3.0}),
        ("mostly waits", lambda s: {"time/idle": 0.09}),
    ],
)
def test_a_cause_is_named_with_its_figures(run, words, change):
    (found,) = diagnose(run(change))
    assert words in found.cause
    assert any(c.isdigit() for c in found.evidence)


@pytest.mark.parametrize(("first", "last"), [(-5.0, -5.0), (-10.0, -2.0), (20.0, 60.0), (0.0, 0.0)])
def test_rewards_of_any_scale_are_healthy(run, first, last):
    """A penalty that shrinks, a percentage that grows, or no reward at all: none of them fell."""
    assert diagnose(run(lambda s: {"reward/all/mean": first if s < 32 else last})) == []


@pytest.mark.parametrize(("scale", "mean", "word"), [(100.0, 3.0, "hard"), (100.0, 97.0, "easy"), (1.0, -9.0, "hard")])
def test_hard_and_easy_are_judged_by_what_counts_as_correct(run, scale, mean, word):
    equal = {"filters/zero_variance": 0.9, "reward/all/mean": mean}
    (found,) = diagnose(run(lambda _: equal, evaluation__correct=scale))
    assert f"too {word}" in found.cause


def test_an_uncorrected_objective_under_lag_is_named(run):
    (found,) = diagnose(run(objective__name="grpo", objective__options__corrected="false"))
    assert "for the policy's own" in found.cause
    assert "15 steps old" in found.evidence
    fresh = run(lambda s: {"off_policy/mean": 0}, objective__name="grpo", objective__options__corrected="false")
    assert diagnose(fresh) == []


def test_a_disagreement_comes_first(run):
    """A disagreement comes first and other objectives have no beta2."""
    causes = [f.cause for f in diagnose(run(lambda s: {"logprob_gap/mean": 1.0, "is_truncated/mean": 0.9}))]
    assert ["disagree" in causes[0], "cut off" in causes[1]] == [True, True]
    assert diagnose(run(lambda s: {"beta2": None}, objective__name="grpo")) == []


@pytest.mark.parametrize(("engine", "alarms"), [("float32", 1), ("auto", 1), ("bfloat16", 0)])
def test_a_gap_is_judged_by_the_coarser_side(run, engine, alarms):
    settings = {"rollout__engine_dtype": engine, "train__precision": "auto"}
    assert len(diagnose(run(lambda s: {"logprob_gap/mean": 0.03}, **settings))) == alarms
    assert len(diagnose(run(lambda s: {"logprob_gap/mean": 0.3}, **settings))) == 1


def test_responses_without_an_answer(run, tmp_path):
    log = RolloutLog(tmp_path / "rollouts" / "rank0.sqlite")
    for name in "ab":
        log.append(plain_group(name, "scored", reward_detail={"answer": ""}))
    (found,) = diagnose(run())
    assert "no answer" in found.cause


def test_bad_input(refused, tmp_path):
    refused("holds no run", "doctor", tmp_path)
    refused("either a run directory or --weights", "doctor")
