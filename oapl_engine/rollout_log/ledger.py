"""Every generated token ends in exactly one column, and the columns add up to what the engines report."""

from collections import Counter
from dataclasses import dataclass, field

from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog

COLUMNS = ("trained", "waiting", "cleared", "aborted", "invalid", "lost", "evaluation")  # and dropped:<rule>


# Why tokens of a column were not trained, and what helps.
REASONS = {
    "dropped:equal_rewards": "all rewards of a group are equal, so they say nothing about the answer: choose problems "
    'that are solved sometimes, a larger schedule.group_size, or objective.equal_groups = "keep"',
    "dropped:group_too_small": "fewer than two scored rollouts in a group, and no recorded rewards: give each prompt "
    "several responses, or record the rewards of its other responses",
    "dropped:overlong": "responses cut at sampling.max_new_tokens are excluded: raise it, or check which token ends a "
    "response",
    "dropped:no_tokens": "no token of the response may be trained on (loss_mask)",
    "dropped:nonfinite": "loss or gradients were not finite: lower optimizer.learning_rate",
    "waiting": "no step took them: a group needs two scored rollouts, or one and the recorded rewards of others, and a "
    "step needs schedule.groups_per_step groups",
    "invalid": "the verifier gave no reward",
}


@dataclass
class Ledger:
    """The columns of a log and its journal, kept up to date from the rows that were added since the last look.

    Both are insert only; reading all of them at every step took longer than the steps.
    """

    log: RolloutLog
    journal: Journal
    columns: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COLUMNS, 0)))
    untrained: dict[str, tuple[str, int]] = field(default_factory=dict)  # rollout key to its column and tokens
    verified: Counter[str] = field(default_factory=Counter)  # rollouts by status
    seen: dict[str, int] = field(default_factory=lambda: {"rollout": 0, "use": 0, "disposition": 0})

    def read(self, engine_tokens: int | None = None) -> dict[str, int]:
        """Tokens by column. engine_tokens: what all engine incarnations generated; the rest was lost with one."""
        trained, self.seen["use"] = self.journal.used_since(self.seen["use"])
        disposed, self.seen["disposition"] = self.journal.disposed_since(self.seen["disposition"])
        # the log last: what the journal names is in it by now
        arrived, self.seen["rollout"] = self.log.tokens_since(self.seen["rollout"])
        self.verified.update(status for _, status, _ in arrived)
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

    def invalid_counts(self) -> tuple[int, int]:
        """(rollouts without a reward, rollouts that were verified), as of the last read."""
        return self.verified["invalid"], self.verified["invalid"] + self.verified["scored"]

    def _move(self, key: str, column: str, tokens: int = 0) -> None:
        before, tokens = self.untrained.get(key, (column, tokens))
        self.columns[before] -= tokens if key in self.untrained else 0
        self.columns[column] += tokens
        self.untrained[key] = (column, tokens)


def explain_untrained(ledger: Ledger) -> str:
    """Where the tokens of a run went that trained nothing, by column with reasons; what no step took comes last."""
    others = ("trained", "evaluation")
    columns = {name: tokens for name, tokens in ledger.read().items() if tokens and name not in others}
    total = sum(columns.values())
    if not total:
        return "no rollout holds a token"
    parts = [
        f"{tokens} of {total} tokens in {name}" + (f" ({REASONS[name]})" if name in REASONS else "")
        for name, tokens in sorted(columns.items(), key=lambda item: (item[0] == "waiting", -item[1]))
    ]
    return "; ".join(parts)
