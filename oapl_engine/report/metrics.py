"""metrics.jsonl: one JSON object per step, always with every key; null means not measured, or not finite.

Names are those of prime-rl where it has one for the same thing. docs/metrics.md is generated from METRICS.
"""

import math
from pathlib import Path
from typing import Any

from oapl_engine.config import ReportConfig
from oapl_engine.errors import ConfigError
from oapl_engine.files import append_jsonl, read_jsonl

# Name to its meaning and unit, in the order of a row.
METRICS = {
    "step": "optimizer step, from 1",
    "policy_version": "version that served during the step",
    "off_policy/min": "optimizer steps between the version that generated a group and this step, least stale group",
    "off_policy/mean": "the same, mean over groups",
    "off_policy/max": "the same, stalest group",
    "reward/all/mean": "mean reward of the step's scored rollouts",
    "reward/all/invalid": "share of the responses verified so far that got no reward",
    "loss": "loss of the step, as the objective normalizes it",
    "residual/mean": "mean of β2·Σ log-ratio - A, reward units; objectives with a squared residual only",
    "advantage/mean": "mean advantage of the trained rollouts, reward units",
    "value/mean": "mean estimated value of the trained groups, reward units",
    "entropy/all/mean": "entropy of the policy at sampled tokens, nats per token",
    "optim/grad_norm": "global gradient norm before clipping",
    "log_ratio/mean": "mean of ln π - ln π_vllm over trained tokens, nats; its negative estimates KL(π_vllm‖π)",
    "log_ratio/std": "standard deviation of the same",
    "log_ratio/max": "largest absolute value of the same",
    "logprob_gap/mean": "mean absolute difference of engine and trainer log-probs at equal weights, nats per token",
    "logprob_gap/max": "largest such difference",
    "mismatch_kl/all/mean": "k3 estimate of the KL divergence of engine and trainer at equal weights, nats per token",
    "seq_len/mean": "mean response length, tokens",
    "is_truncated/mean": "share of responses cut at sampling.max_new_tokens",
    "filters/zero_variance": "share of groups whose rewards are all equal",
    "tokens/generated": "response tokens in the log so far",
    "tokens/trained": "response tokens that this step trained on",
    "tokens/engine": "tokens that all engines report to have generated so far",
    "time/generate": "seconds since the last step in which groups were in flight",
    "time/verify": "seconds of verdicts, summed over responses; they overlap with generation",
    "time/train": "seconds of the optimizer step",
    "time/publish": "seconds of publishing, without attestation",
    "time/attest": "seconds of attestation",
    "time/idle": "seconds since the last step that nothing above accounts for",
    "ledger": "tokens by the column in which they ended; the columns add up to tokens/engine",
    "beta2": "β2 of this step; objectives with a squared residual only",
    "optim/lr": "learning rate",
    "weights/changed_share": "share of the engine's elements whose bits the last publish changed",
    "time/evaluate": "seconds of evaluation",
    "time/step": "seconds since the last step",
}
# Names that version 0.1 wrote.
RENAMED = {
    "lag_min": "off_policy/min",
    "lag_mean": "off_policy/mean",
    "lag_max": "off_policy/max",
    "reward_mean": "reward/all/mean",
    "residual_mean": "residual/mean",
    "advantage_mean": "advantage/mean",
    "value_mean": "value/mean",
    "entropy": "entropy/all/mean",
    "grad_norm": "optim/grad_norm",
    "log_ratio_mean": "log_ratio/mean",
    "log_ratio_std": "log_ratio/std",
    "log_ratio_max": "log_ratio/max",
    "logprob_gap_mean": "logprob_gap/mean",
    "logprob_gap_max": "logprob_gap/max",
    "logprob_gap_k3": "mismatch_kl/all/mean",
    "response_tokens_mean": "seq_len/mean",
    "truncated_share": "is_truncated/mean",
    "equal_group_share": "filters/zero_variance",
    "tokens_generated": "tokens/generated",
    "tokens_trained": "tokens/trained",
    "engine_tokens": "tokens/engine",
    "seconds_generate": "time/generate",
    "seconds_verify": "time/verify",
    "seconds_train": "time/train",
    "seconds_publish": "time/publish",
    "seconds_attest": "time/attest",
    "seconds_idle": "time/idle",
    "learning_rate": "optim/lr",
    "changed_share": "weights/changed_share",
    "seconds_evaluate": "time/evaluate",
    "seconds_total": "time/step",
}


class MetricsWriter:
    """Appends to metrics.jsonl and mirrors numbers to the trackers that the recipe asks for."""

    def __init__(self, run_dir: Path, report: ReportConfig | None = None) -> None:
        self.path = run_dir / "metrics.jsonl"
        report = report or ReportConfig()
        self._trackers = [_tensorboard(run_dir)] if report.tensorboard else []
        self._trackers += [_wandb(run_dir, report.wandb)] if report.wandb else []

    def write(self, values: dict[str, Any]) -> dict[str, Any]:
        """Write one step; absent keys become null. Returns the row. Raises ValueError for a name not in METRICS."""
        for name in values:
            if name not in METRICS:
                raise ValueError(f"metric {_renamed(name) or f'{name} is not in report.metrics.METRICS'}")
        row = {key: finite(values.get(key)) for key in METRICS}
        append_jsonl(self.path, [row])
        for track in self._trackers:
            track({k: v for k, v in row.items() if isinstance(v, int | float)}, row["step"])
        return row


def _renamed(name: str) -> str | None:
    """What to say of a name that version 0.1 wrote; None for any other."""
    return f"{name} is now {RENAMED[name]}" if name in RENAMED else None


def finite(value: Any) -> Any:
    """The value, or None where it is a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl. A step that a killed run wrote and a resumed run wrote again counts once, the last.

    Raises ConfigError for rows of version 0.1, whose metrics had other names.
    """
    rows = {row["step"]: row for row in read_jsonl(path)}
    for name in next(iter(rows.values()), {}):
        if renamed := _renamed(name):
            raise ConfigError(f"{path} was written by oapl-engine 0.1: {renamed}; read it with that version")
    return [rows[step] for step in sorted(rows)]


def read_evaluations(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Rows of eval.jsonl for k = 1, by optimizer step."""
    return {row["step"]: row for row in read_jsonl(run_dir / "eval.jsonl") if row["k"] == 1}


def _tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("report.tensorboard = true needs the tensorboard package: pip install tensorboard") from error
    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def track(row: dict[str, float], step: int) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return track


def _wandb(run_dir: Path, project: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f'report.wandb = "{project}" needs the wandb package: pip install wandb') from error
    run = wandb.init(project=project, dir=str(run_dir), name=run_dir.name)
    return lambda row, step: run.log(row, step=step)
