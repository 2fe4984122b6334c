"""The journal: the only truth about what was consumed and published. Insert only; a step is an intent, then done."""

import json
from dataclasses import dataclass

from oapl_engine.rollout_log.database import Database

SCHEMA = """
CREATE TABLE IF NOT EXISTS step(step INTEGER NOT NULL, version INTEGER NOT NULL, keys TEXT NOT NULL,
    state TEXT NOT NULL CHECK(state IN ('intent', 'done')), weight_hash TEXT, PRIMARY KEY(step, state));
CREATE TABLE IF NOT EXISTS published(version INTEGER PRIMARY KEY, step INTEGER NOT NULL, weight_hash TEXT NOT NULL,
    incarnation INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS "use"(key TEXT NOT NULL, step INTEGER NOT NULL, PRIMARY KEY(key, step));
CREATE TABLE IF NOT EXISTS disposition(key TEXT NOT NULL, "column" TEXT NOT NULL, PRIMARY KEY(key, "column"));
CREATE TABLE IF NOT EXISTS tokens(incarnation INTEGER NOT NULL, "column" TEXT NOT NULL, n INTEGER NOT NULL);
"""
STEP = "INSERT OR IGNORE INTO step VALUES (?, ?, ?, ?, ?)"


@dataclass(frozen=True)
class JournalStep:
    """One optimizer step and the groups that it was given."""

    step: int
    groups: tuple[str, ...]


class Journal(Database):
    """journal.sqlite of a run directory."""

    schema = SCHEMA

    def intent(self, step: int, version: int, groups: tuple[str, ...]) -> None:
        """Before the weights change: this step will train these groups. A replayed step keeps its first row."""
        self.write((STEP, [(step, version, json.dumps(groups), "intent", None)]))

    def done(self, step: int, version: int, groups: tuple[str, ...], used: list[str], weight_hash: str) -> str:
        """After the weights changed. used: keys of the rollouts that took part in the loss.

        Returns the weights' hash when this step was done first; if it is not weight_hash, a replay gave other weights.
        """
        row = (step, version, json.dumps(groups), "done", weight_hash)
        self.write((STEP, [row]), ('INSERT OR IGNORE INTO "use" VALUES (?, ?)', [(key, step) for key in used]))
        ((first,),) = self.rows("SELECT weight_hash FROM step WHERE step = ? AND state = 'done'", step)
        return first or weight_hash

    def published(self, version: int, step: int, weight_hash: str, incarnation: int) -> None:
        self.write(("INSERT INTO published VALUES (?, ?, ?, ?)", [(version, step, weight_hash, incarnation)]))

    def dispose(self, columns: dict[str, str]) -> None:
        """Key of a rollout that will never be trained to the column where its tokens end."""
        self.write(("INSERT OR IGNORE INTO disposition VALUES (?, ?)", list(columns.items())))

    def count_tokens(self, incarnation: int, column: str, n: int) -> None:
        """Tokens that an engine generated outside the log: evaluation; or its own total so far (column "engine")."""
        self.write(("INSERT INTO tokens VALUES (?, ?, ?)", [(incarnation, column, n)]))

    def steps(self) -> list[JournalStep]:
        """Every step that was begun, in order."""
        rows = self.rows("SELECT step, keys FROM step GROUP BY step ORDER BY step")
        return [JournalStep(row["step"], tuple(json.loads(row["keys"]))) for row in rows]

    def versions(self) -> list[tuple[int, int]]:
        """(version, step) of every publish."""
        rows = self.rows("SELECT version, step FROM published ORDER BY version")
        return [(row["version"], row["step"]) for row in rows]

    def incarnations(self) -> int:
        """Engine incarnations that this run has published to or counted."""
        query = "SELECT max(i) FROM (SELECT incarnation i FROM published UNION SELECT incarnation FROM tokens)"
        return (self.rows(query)[0][0] or 0) + 1

    def uses(self) -> dict[str, list[int]]:
        """Rollout key → the steps that trained on it."""
        steps: dict[str, list[int]] = {}
        for key, step in self.rows('SELECT key, step FROM "use" ORDER BY step'):
            steps.setdefault(key, []).append(step)
        return steps

    def used_since(self, row: int) -> tuple[list[str], int]:
        """Keys of the rollouts trained after row number `row` of the uses, and the last row's number."""
        rows = self.rows('SELECT key, rowid FROM "use" WHERE rowid > ? ORDER BY rowid', row)
        return [r["key"] for r in rows], rows[-1]["rowid"] if rows else row

    def disposed_since(self, row: int) -> tuple[list[tuple[str, str]], int]:
        """(key, column) of what was disposed of after row number `row`, and the last row's number."""
        rows = self.rows('SELECT key, "column", rowid FROM disposition WHERE rowid > ? ORDER BY rowid', row)
        return [(r["key"], r["column"]) for r in rows], rows[-1]["rowid"] if rows else row

    def dispositions(self) -> dict[str, str]:
        return dict(self.disposed_since(0)[0])

    def evaluation_tokens(self) -> int:
        return self.rows("SELECT sum(n) FROM tokens WHERE \"column\" = 'evaluation'")[0][0] or 0

    def engine_tokens(self) -> int | None:
        """Tokens that the engines of all incarnations have generated, as last reported; None without an engine."""
        query = "SELECT sum(n) FROM (SELECT max(n) n FROM tokens WHERE \"column\" = 'engine' GROUP BY incarnation)"
        return self.rows(query)[0][0]
