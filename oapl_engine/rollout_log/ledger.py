"""Every generated token ends in exactly one column, and the columns add up to what the engines report."""

from collections import Counter
from dataclasses import dataclass, field

from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog

COLUMNS = ("trained", "waiting", "cleared", "aborted", "invalid", "lost", "evaluation")  # and dropped:<rule>


@dataclass
class Ledger:
    """The columns of a log and its journal, kept up to date from the rows that were added since the last look.

    Both are insert only; reading all of them at every step took longer than the steps.
    """

    log: RolloutLog
    journal: Journal
    columns: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COLUMNS, 0)))
    untrained: dict[str, tuple[str, int]] = field(default_factory=dict)  # rollout key to its column and tokens
    seen: dict[str, int] = field(default_factory=lambda: {"rollout": 0, "use": 0, "disposition": 0})

    def read(self, engine_tokens: int | None = None) -> dict[str, int]:
        """Tokens by column. engine_tokens: what all engine incarnations generated; the rest was lost with one."""
        trained, self.seen["use"] = self.journal.used_since(self.seen["use"])
        disposed, self.seen["disposition"] = self.journal.disposed_since(self.seen["disposition"])
        # the log last: what the journal names is in it by now
        arrived, self.seen["rollout"] = self.log.tokens_since(self.seen["rollout"])
        for key, status, tokens in arrived:
            self._move(key, "waiting" if status == "scored" else status, tokens)
        for key, column in disposed:
            if key in self.untrained:
                self._move(key, column)
        for key in trained:
            if key in self.untrained:
                self._move(key, "trained")
                del self.untrained[key]
        columns = self.columns.copy()
        columns["evaluation"] = self.journal.evaluation_tokens()
        if engine_tokens is not None:
            columns["lost"] += max(0, engine_tokens - columns.total())
        return dict(columns)

    def generated(self) -> int:
        """Tokens of all rollouts in the log, as of the last read."""
        return self.columns.total()

    def _move(self, key: str, column: str, tokens: int = 0) -> None:
        before, tokens = self.untrained.get(key, (column, tokens))
        self.columns[before] -= tokens if key in self.untrained else 0
        self.columns[column] += tokens
        self.untrained[key] = (column, tokens)
