"""`oapl doctor RUN`: what the metrics of a run say about why it does not learn, likeliest cause first.

Each rule is one function of the rows of metrics.jsonl; its limits are next to it and are reported with the finding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oapl_engine.config import Recipe, load_recipe, resolve_engine_dtype, resolve_train_config
from oapl_engine.errors import ConfigError
from oapl_engine.report.metrics import read_metrics
from oapl_engine.rollout_log.log import RolloutLog
from oapl_engine.weights.attest import TOLERANCE

HOT_NATS = 1.0  # KL(π_vllm‖π) per token inside one window
LAG_LIMIT = 8  # steps that a rollout may be old without any correction
EQUAL_SHARE, TRUNCATED_SHARE, UNPARSED_SHARE, IDLE_SHARE = 0.8, 0.3, 0.2, 0.5

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """A cause, the figures that speak for it, and what to change."""

    cause: str
    evidence: str
    remedy: str


def diagnose(run_dir: Path) -> list[Finding]:
    """Findings of a run, likeliest first. Raises ConfigError where there is no run."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    if not rows or not (run_dir / "config.toml").exists():
        raise ConfigError(f"{run_dir} holds no run with a finished step: name a run directory")
    recipe = load_recipe(run_dir / "config.toml")
    return [finding for rule in RULES for finding in rule(rows, recipe)] + list(_unparsed(run_dir))


def print_diagnosis(run_dir: Path) -> None:
    """Findings on stdout, with what was seen and what to try; the last line counts them. Raises ConfigError."""
    found = diagnose(run_dir)
    for finding in found:
        print(f"{finding.cause}\n  seen: {finding.evidence}\n  try:  {finding.remedy}")
    print(f"doctor: {len(found)} likely causes" if found else "doctor: nothing stands out")


def _mean(rows: Rows, key: str) -> float:
    values = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(values)) if values else math.nan


def _quarters(rows: Rows, key: str) -> tuple[float, float]:
    """Means of the first and of the last quarter."""
    n = max(1, len(rows) // 4)
    return _mean(rows[:n], key), _mean(rows[-n:], key)


def _gap(rows: Rows, recipe: Recipe) -> Iterator[Finding]:
    exact = resolve_engine_dtype(recipe) == resolve_train_config(recipe).precision == "float32"
    coarser = "float32" if exact else "bfloat16"  # of the two sides
    gap, limit = _mean(rows, "logprob_gap/mean"), TOLERANCE[coarser]
    if gap > limit:
        yield Finding(
            "engine and trainer disagree on log-probs",
            f"logprob_gap/mean {gap:.3g} nats at equal weights; {coarser} should stay below {limit:g}",
            "everything else is misread until this is explained: oapl doctor --weights MODEL_DIR, the same temperature "
            "and dtype on both sides, no top_p or top_k",
        )


def _refused(rows: Rows, _: Recipe) -> Iterator[Finding]:
    skipped = sum(row.get("loss") is None and (row.get("filters/zero_variance") or 0) < 1 for row in rows)
    if skipped >= 2:
        yield Finding(
            "steps are skipped for numbers that are not finite",
            f"{skipped} of {len(rows)} steps have no loss",
            "lower optimizer.learning_rate; see the lines `step … skipped` for what was NaN",
        )


def _invalid(rows: Rows, recipe: Recipe) -> Iterator[Finding]:
    share, limit = rows[-1].get("reward/all/invalid") or 0.0, recipe.reward.max_invalid_share
    if share > limit / 2:
        yield Finding(
            "the verifier gives many responses no reward",
            f"reward/all/invalid {share:.2f} (reward.max_invalid_share = {limit:g} ends a run)",
            "the run prints the first such response with its traceback; raise reward.timeout_seconds where it is slow",
        )


def _equal_groups(rows: Rows, recipe: Recipe) -> Iterator[Finding]:
    share, reward = _mean(rows, "filters/zero_variance"), _mean(rows, "reward/all/mean")
    if share > EQUAL_SHARE:
        hard = reward < recipe.evaluation.correct / 2
        yield Finding(
            f"almost all groups are all equal: the task is too {'hard' if hard else 'easy'}",
            f"filters/zero_variance {share:.2f} (limit {EQUAL_SHARE}), reward {reward:.2f}",
            'choose other problems, a larger schedule.group_size, or objective.equal_groups = "resample"',
        )


def _truncation(rows: Rows, recipe: Recipe) -> Iterator[Finding]:
    share = _mean(rows, "is_truncated/mean")
    if share > TRUNCATED_SHARE:
        most = recipe.sampling.max_new_tokens
        yield Finding(
            "responses are cut off",
            f"is_truncated/mean {share:.2f} (limit {TRUNCATED_SHARE}) at sampling.max_new_tokens = {most}",
            'raise sampling.max_new_tokens, or objective.overlong = "soft"; check that the stop token is the model\'s',
        )


def _hot(rows: Rows, recipe: Recipe) -> Iterator[Finding]:
    kl = max((-row["log_ratio/mean"] for row in rows if row.get("log_ratio/mean") is not None), default=0.0)
    (reward_0, reward_1), (entropy_0, entropy_1) = (
        _quarters(rows, "reward/all/mean"),
        _quarters(rows, "entropy/all/mean"),
    )
    fell = reward_0 - reward_1 > 0.3 * abs(reward_0)  # rewards may be negative
    collapsed = entropy_1 < 0.3 * entropy_0 and reward_1 < reward_0
    if kl > HOT_NATS or fell or collapsed:
        rate = recipe.optimizer.learning_rate
        yield Finding(
            "the learning rate is too hot",
            f"KL(π_vllm‖π) up to {kl:.2g} nats per token (limit {HOT_NATS:g}); from the first to the last quarter "
            f"reward {reward_0:.3f} → {reward_1:.3f}, entropy {entropy_0:.2f} → {entropy_1:.2f}",
            f"halve optimizer.learning_rate = {rate:g}, or publish earlier with schedule.max_kl",
        )


def _uncorrected(rows: Rows, recipe: Recipe) -> Iterator[Finding]:
    lag = max(row["off_policy/mean"] for row in rows)
    if not recipe.objective.options.get("corrected", True) and lag >= LAG_LIMIT:
        yield Finding(
            "the objective takes old rollouts for the policy's own",
            f"objective.options.corrected = false with rollouts up to {lag:.0f} steps old (limit {LAG_LIMIT})",
            'objective.name = "oapl", or corrected = true, or a smaller schedule.lag (docs/results.md: from L = 16 on '
            "it does not learn)",
        )


def _scale(rows: Rows, recipe: Recipe) -> Iterator[Finding]:
    """β2·Δ against A: Δ is a sum over the response, so β2 must fit its length (algorithm.md)."""
    beta2 = _mean(rows, "beta2")
    if math.isnan(beta2):  # the objective has no squared residual
        return
    late = [row for row in rows if row["off_policy/mean"] >= 0.5 * max(r["off_policy/mean"] for r in rows)]
    fresh = [row for row in rows if row["off_policy/mean"] <= 1 and row.get("loss")]
    asked = math.sqrt(_mean(fresh, "loss")) if fresh else math.nan  # with Δ = 0 the loss is the mean of A²
    tokens = _mean(rows, "seq_len/mean")
    reached = beta2 * _mean(late, "log_ratio/std") * math.sqrt(tokens)
    evidence = (
        f"rms(A) {asked:.3f}; β2·Δ late in a window about {reached:.3f}; A/β2 asks for {asked / beta2:.0f} nats per "
        f"response of {tokens:.0f} tokens"
    )
    if asked / beta2 > 3 * tokens:
        yield Finding(
            "β2 is too small for this length: it only sets the slope, nothing holds π near π_vllm",
            evidence,
            "raise objective.beta2 (A/β2 of 5 to 10 nats per response worked), or objective.scale_free_nats = 5",
        )
    elif reached > 2 * asked:
        yield Finding(
            "β2 is too large: the pull back to π_vllm outweighs the advantage",
            evidence,
            "lower objective.beta2, or objective.scale_free_nats = 5",
        )


def _idle(rows: Rows, _: Recipe) -> Iterator[Finding]:
    idle, total = sum(row["time/idle"] or 0 for row in rows[1:]), sum(row["time/step"] or 0 for row in rows[1:])
    if total and idle / total >= IDLE_SHARE:
        yield Finding(
            "the trainer mostly waits",
            f"{idle / total:.0%} of {total:.0f} s measured as nothing at all",
            "python -m benchmarks scale says which mode and L fit this machine",
        )


def _unparsed(run_dir: Path) -> Iterator[Finding]:
    """Responses in which the verifier found no answer at all."""
    seen = empty = 0
    for path in sorted((run_dir / "rollouts").glob("rank*.sqlite")):
        for rollout in RolloutLog.reading(path).rollouts():
            if rollout.status == "scored" and "answer" in rollout.reward_detail:
                seen += 1
                empty += not rollout.reward_detail["answer"]
    if seen and empty / seen >= UNPARSED_SHARE:
        yield Finding(
            "the verifier finds no answer in many responses",
            f"{empty} of {seen} scored responses have none (limit {UNPARSED_SHARE:.0%})",
            "say in the prompt how to answer (data.template, data.system), or change reward.options.extract",
        )


RULES = (_gap, _refused, _invalid, _equal_groups, _uncorrected, _truncation, _hot, _scale, _idle)
