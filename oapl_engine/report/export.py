"""`oapl rollouts RUN`: the log joined with the journal, as plain rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog
from oapl_engine.samples import Rollout


def export_rollouts(run_dir: Path) -> Iterator[dict[str, Any]]:
    """One JSON-ready object a rollout, in order of arrival (schema: docs/formats.md)."""
    uses = Journal(run_dir / "journal.sqlite").uses()
    for path in sorted((run_dir / "rollouts").glob("rank*.sqlite")):
        for rollout in RolloutLog(path).rollouts():
            yield _row(rollout, uses.get(rollout.key, []))


def _row(r: Rollout, trained_steps: list[int]) -> dict[str, Any]:
    versions = [s.version for s in r.spans] or [0]
    return {
        "key": r.key,
        "prompt_id": r.prompt_id,
        "group": r.group,
        "sample": r.sample,
        "version_first": min(versions),
        "version_last": max(versions),
        "prompt_token_ids": r.token_ids[: r.prompt_length].tolist(),
        "response_token_ids": r.response_ids.tolist(),
        "behavior_logprobs": [float(x) for x in r.behavior_logprob[r.prompt_length :]],
        "reward": r.reward,
        "status": r.status,
        "trained_steps": trained_steps,
    }
