"""metrics.jsonl: one JSON object a step, always with every key; null means not measured, or not finite."""

import json
import math
from pathlib import Path
from typing import Any

from oapl_engine.config import ReportConfig
from oapl_engine.errors import ConfigError

KEYS = (
    *(
        "step",
        "policy_version",
        "off_policy/min",
        "off_policy/mean",
        "off_policy/max",
        "reward/all/mean",
        "loss",
        "residual/mean",
    ),
    *("advantage/mean", "value/mean", "entropy", "optim/grad_norm", "log_ratio/mean", "log_ratio/std", "log_ratio/max"),
    *("logprob_gap/mean", "logprob_gap/max", "mismatch_kl/all/mean", "seq_len/mean", "is_truncated/mean"),
    *("filters/zero_variance", "tokens/generated", "tokens/trained", "tokens/engine", "time/generate"),
    *("time/verify", "time/train", "time/publish", "time/attest", "time/idle", "ledger"),
)
# Beyond the contract: what the run used, and the share of weight bytes that the last publish changed.
EXTRA = ("beta2", "learning_rate", "weights/changed_share", "time/evaluate", "time/step")


class MetricsWriter:
    """Appends to metrics.jsonl and mirrors numbers to the trackers that the recipe asks for."""

    def __init__(self, run_dir: Path, report: ReportConfig | None = None):
        self.path = run_dir / "metrics.jsonl"
        report = report or ReportConfig()
        self._trackers = [_tensorboard(run_dir)] if report.tensorboard else []
        self._trackers += [_wandb(run_dir, report.wandb)] if report.wandb else []

    def write(self, values: dict[str, Any]) -> dict[str, Any]:
        """Write one step; absent keys become null. An unknown key raises ValueError (a typing error in our code)."""
        unknown = set(values) - set(KEYS) - set(EXTRA)
        if unknown:
            raise ValueError(f"metrics {sorted(unknown)} are not in the schema of metrics.jsonl")
        row = {key: finite(values.get(key)) for key in (*KEYS, *EXTRA)}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        for track in self._trackers:
            track({k: v for k, v in row.items() if isinstance(v, int | float)}, row["step"])
        return row


def finite(value: Any) -> Any:
    """The value, or None where it is a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl. A step that a killed run wrote and a resumed run wrote again counts once, the last."""
    rows = {row["step"]: row for row in read_rows(path)}
    return [rows[step] for step in sorted(rows)]


def read_evaluations(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Rows of eval.jsonl for k = 1, by optimizer step."""
    return {row["step"]: row for row in read_rows(run_dir / "eval.jsonl") if row["k"] == 1}


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
