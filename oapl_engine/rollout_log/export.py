"""Finished rollouts of a run as rows (`oapl rollouts`), which offline training reads back: see own_format."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog
from oapl_engine.samples import Rollout


def export_rollouts(run_dir: Path) -> Iterator[dict[str, Any]]:
    """One JSON-ready object per rollout of a run, in order of arrival. docs/formats.md lists the fields.

    Example: `json.dumps(next(export_rollouts(Path("runs/micro"))))` is a line that read_rollouts reads back.
    """
    journal = run_dir / "journal.sqlite"
    uses = Journal.reading(journal).uses() if journal.exists() else {}
    for path in sorted((run_dir / "rollouts").glob("rank*.sqlite")):
        for rollout in RolloutLog.reading(path).rollouts():
            yield _exported(rollout, uses.get(rollout.key, []))


def _exported(rollout: Rollout, trained_steps: list[int]) -> dict[str, Any]:
    versions = [span.version for span in rollout.spans] or [0]
    mask = rollout.loss_mask[rollout.prompt_length :]
    return {
        "key": rollout.key,
        "prompt_id": rollout.prompt_id,
        "group": rollout.group,
        "sample": rollout.sample,
        "version_first": min(versions),
        "version_last": max(versions),
        "prompt_token_ids": rollout.token_ids[: rollout.prompt_length].tolist(),
        "response_token_ids": rollout.response_ids.tolist(),
        "behavior_logprobs": [float(x) for x in rollout.behavior_logprob[rollout.prompt_length :]],
        "loss_mask": None if mask.all() else mask.tolist(),
        "finish": rollout.finish,
        "reward": rollout.reward,
        "status": rollout.status,
        "trained_steps": trained_steps,
    }
