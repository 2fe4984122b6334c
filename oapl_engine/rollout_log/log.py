"""The rollout log: append-only SQLite, one transaction a group, a CRC a row. What is not here was not generated."""

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from oapl_engine.rollout_log.database import CorruptLogError, Database
from oapl_engine.samples import Group, Prompt, Rollout, Span

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS prompt(
    id TEXT PRIMARY KEY, task TEXT NOT NULL, token_ids BLOB NOT NULL, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rollout(
    key TEXT PRIMARY KEY, prompt_id TEXT NOT NULL, "group" TEXT NOT NULL, sample INTEGER NOT NULL, task TEXT NOT NULL,
    version_first INTEGER NOT NULL, version_last INTEGER NOT NULL, prompt_length INTEGER NOT NULL,
    token_ids BLOB NOT NULL, loss_mask BLOB NOT NULL, behavior_logprob BLOB NOT NULL, spans TEXT NOT NULL,
    finish TEXT NOT NULL, status TEXT NOT NULL, reward REAL, reward_detail TEXT NOT NULL,
    started_ns INTEGER NOT NULL, finished_ns INTEGER NOT NULL, crc32 INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS rollout_group ON rollout("group", sample);
INSERT OR IGNORE INTO meta VALUES ('schema', '1');
"""
COLUMNS = (
    'key, prompt_id, "group", sample, task, version_first, version_last, prompt_length, token_ids, loss_mask, '
    "behavior_logprob, spans, finish, status, reward, reward_detail, started_ns, finished_ns"
)


class RolloutLog(Database):
    """One rank's rollouts."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        super().__init__(self.path, SCHEMA)

    def append(self, group: Group) -> None:
        """Store a group; on return it is on disk. A key that is already stored raises ValueError."""
        p = group.prompt
        prompt = (p.id, p.task, _blob(p.token_ids, "<i4"), json.dumps(p.record))
        rows = [_to_row(r) for r in group.rollouts]
        try:
            insert = f"INSERT INTO rollout VALUES ({', '.join('?' * 19)})"
            self.write(("INSERT OR IGNORE INTO prompt VALUES (?, ?, ?, ?)", [prompt]), (insert, rows))
        except sqlite3.IntegrityError as error:
            raise ValueError(f"group {group.id} is in the log {self.path} already: {error}") from error

    def group(self, key: str) -> Group:
        """The stored group `key`. Raises KeyError if absent, CorruptLogError if a row's checksum fails."""
        rows = self.rows(f'SELECT {COLUMNS}, crc32 FROM rollout WHERE "group" = ? ORDER BY sample', key)
        if not rows:
            raise KeyError(f"group {key} is not in {self.path}")
        rollouts = tuple(_from_row(row, self.path) for row in rows)
        ((ids, task, record),) = self.rows("SELECT token_ids, task, record FROM prompt WHERE id = ?", rows[0][1])
        prompt = Prompt(rows[0][1], np.frombuffer(ids, "<i4"), task, json.loads(record))
        return Group(key, prompt, rollouts, min(span.version for r in rollouts for span in r.spans or (Span(0, 0, 0),)))

    def groups(self, keys: Iterable[str]) -> list[Group]:
        return [self.group(key) for key in keys]

    def group_keys(self) -> list[str]:
        """Ids of all stored groups in the order of arrival."""
        return [key for (key,) in self.rows('SELECT "group" FROM rollout GROUP BY "group" ORDER BY min(rowid)')]

    def rollouts(self) -> Iterator[Rollout]:
        """Every stored rollout, in order of arrival."""
        for key in self.group_keys():
            yield from self.group(key).rollouts

    def tokens_since(self, row: int) -> tuple[list[tuple[str, str, int]], int]:
        """(key, status, response tokens) of the rollouts after row number `row`, and the last row's number."""
        columns = "key, status, length(token_ids) / 4 - prompt_length, rowid"
        rows = self.rows(f"SELECT {columns} FROM rollout WHERE rowid > ? ORDER BY rowid", row)
        return [r[:3] for r in rows], rows[-1][3] if rows else row


def _blob(array: Any, kind: str) -> bytes:
    return np.ascontiguousarray(array, dtype=kind).tobytes()


def _to_row(r: Rollout) -> tuple[Any, ...]:
    versions = [s.version for s in r.spans] or [0]
    spans = json.dumps([[s.version, s.start, s.end] for s in r.spans])
    row = (
        *(r.key, r.prompt_id, r.group, r.sample, r.task, min(versions), max(versions), r.prompt_length),
        *(_blob(r.token_ids, "<i4"), _blob(r.loss_mask, "u1"), _blob(r.behavior_logprob, "<f4"), spans),
        *(r.finish, r.status, r.reward, json.dumps(r.reward_detail), r.started_ns, r.finished_ns),
    )
    return (*row, _crc(row))


def _crc(row: tuple[Any, ...]) -> int:
    crc = 0
    for value in row:
        crc = zlib.crc32(value if isinstance(value, bytes) else repr(value).encode(), crc)
    return crc


def _from_row(row: tuple[Any, ...], path: Path) -> Rollout:
    *values, crc = row
    if _crc(tuple(values)) != crc:
        raise CorruptLogError(f"{path}: rollout {values[0]} does not match its checksum; restore the file from a copy")
    key, prompt_id, group, sample, task, _, _, prompt_length, ids, mask, logprob, spans = values[:12]
    finish, status, reward, detail, started, finished = values[12:]
    return Rollout(
        *(key, prompt_id, group, sample, task, np.frombuffer(ids, "<i4"), prompt_length, np.frombuffer(mask, "u1")),
        *(np.frombuffer(logprob, "<f4"), tuple(Span(*s) for s in json.loads(spans)), finish, status, reward),
        *(json.loads(detail), started, finished),
    )
