"""Every generated token ends in exactly one column, and the columns add up to what the engines report."""

from __future__ import annotations

from collections import Counter

from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog

COLUMNS = ("trained", "waiting", "cleared", "aborted", "invalid", "lost", "evaluation")  # and dropped:<rule>


def ledger(log: RolloutLog, journal: Journal, engine_tokens: int | None = None) -> dict[str, int]:
    """Tokens by column. engine_tokens: what the engines of all incarnations generated; the rest was lost with one."""
    trained, disposed = journal.uses(), journal.dispositions()
    columns: Counter[str] = Counter(dict.fromkeys(COLUMNS, 0))
    for key, status, tokens in log.tokens():
        column = "trained" if key in trained else disposed.get(key, "waiting" if status == "scored" else status)
        columns[column] += tokens
    columns["evaluation"] += journal.evaluation_tokens()
    if engine_tokens is not None:
        columns["lost"] += max(0, engine_tokens - sum(columns.values()))
    return dict(columns)
