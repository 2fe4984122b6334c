"""The rollout log: append-only SQLite, one transaction per group, a CRC per row. What is not here was not generated."""

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
CREATE TABLE IF NOT EXISTS prompt(
    id TEXT PRIMARY KEY, task TEXT NOT NULL, token_ids BLOB NOT NULL, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rollout(
    key TEXT PRIMARY KEY, prompt_id TEXT NOT NULL, "group" TEXT NOT NULL, sample INTEGER NOT NULL, task TEXT NOT NULL,
    version_first INTEGER NOT NULL, version_last INTEGER NOT NULL, prompt_length INTEGER NOT NULL,
    token_ids BLOB NOT NULL, loss_mask BLOB NOT NULL, behavior_logprob BLOB NOT NULL, spans TEXT NOT NULL,
    finish TEXT NOT NULL, status TEXT NOT NULL, reward REAL, reward_detail TEXT NOT NULL,
    finished_ns INTEGER NOT NULL, crc32 INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS rollout_group ON rollout("group", sample);
"""


class RolloutLog(Database):
    """One rank's rollouts."""

    schema = SCHEMA

    def append(self, group: Group) -> None:
        """Store a group; on return it is on disk. A key that is already stored raises ValueError."""
        p = group.prompt
        prompt = (p.id, p.task, _blob(p.token_ids, "<i4"), json.dumps(p.record))
        rows = [_to_row(rollout) for rollout in group.rollouts]
        names = ", ".join(f'"{name}"' for name in rows[0])
        insert = f"INSERT INTO rollout ({names}) VALUES ({', '.join('?' * len(rows[0]))})"
        try:
            self.write(
                ("INSERT OR IGNORE INTO prompt VALUES (?, ?, ?, ?)", [prompt]),
                (insert, [tuple(row.values()) for row in rows]),
            )
        except sqlite3.IntegrityError as error:
            raise ValueError(f"group {group.id} is in the log {self.path} already: {error}") from error

    def group(self, key: str) -> Group:
        """The stored group `key`. Raises KeyError if absent, CorruptLogError if a row's checksum fails."""
        rows = self.rows('SELECT * FROM rollout WHERE "group" = ? ORDER BY sample', key)
        if not rows:
            raise KeyError(f"group {key} is not in {self.path}")
        rollouts = tuple(_from_row(row, self.path) for row in rows)
        prompt_id = rollouts[0].prompt_id
        (row,) = self.rows("SELECT token_ids, task, record FROM prompt WHERE id = ?", prompt_id)
        prompt = Prompt(prompt_id, np.frombuffer(row["token_ids"], "<i4"), row["task"], json.loads(row["record"]))
        versions = [span.version for rollout in rollouts for span in rollout.spans or (Span(0, 0, 0),)]
        return Group(key, prompt, rollouts, min(versions))

    def groups(self, keys: Iterable[str]) -> list[Group]:
        return [self.group(key) for key in keys]

    def group_keys(self) -> list[str]:
        """Ids of all stored groups in the order of arrival."""
        rows = self.rows('SELECT "group" FROM rollout GROUP BY "group" ORDER BY min(rowid)')
        return [row["group"] for row in rows]

    def rollouts(self) -> Iterator[Rollout]:
        """Every stored rollout, in order of arrival."""
        for key in self.group_keys():
            yield from self.group(key).rollouts

    def tokens_since(self, row: int) -> tuple[list[tuple[str, str, int]], int]:
        """(key, status, response tokens) of the rollouts after row number `row`, and the last row's number."""
        columns = "key, status, length(token_ids) / 4 - prompt_length AS tokens, rowid"
        rows = self.rows(f"SELECT {columns} FROM rollout WHERE rowid > ? ORDER BY rowid", row)
        return [(r["key"], r["status"], r["tokens"]) for r in rows], rows[-1]["rowid"] if rows else row


def _blob(array: Any, kind: str) -> bytes:
    return np.ascontiguousarray(array, dtype=kind).tobytes()


def _to_row(rollout: Rollout) -> dict[str, Any]:
    """Columns of a rollout, in the order of the table."""
    versions = [span.version for span in rollout.spans] or [0]
    row = {
        "key": rollout.key,
        "prompt_id": rollout.prompt_id,
        "group": rollout.group,
        "sample": rollout.sample,
        "task": rollout.task,
        "version_first": min(versions),
        "version_last": max(versions),
        "prompt_length": rollout.prompt_length,
        "token_ids": _blob(rollout.token_ids, "<i4"),
        "loss_mask": _blob(rollout.loss_mask, "u1"),
        "behavior_logprob": _blob(rollout.behavior_logprob, "<f4"),
        "spans": json.dumps([[span.version, span.start, span.end] for span in rollout.spans]),
        "finish": rollout.finish,
        "status": rollout.status,
        "reward": rollout.reward,
        "reward_detail": json.dumps(rollout.reward_detail),
        "finished_ns": rollout.finished_ns,
    }
    return row | {"crc32": _crc(row)}


def _crc(row: dict[str, Any]) -> int:
    crc = 0
    for value in row.values():
        crc = zlib.crc32(value if isinstance(value, bytes) else repr(value).encode(), crc)
    return crc


def _from_row(stored: sqlite3.Row, path: Path) -> Rollout:
    row = dict(stored)
    if row.pop("crc32") != _crc(row):
        raise CorruptLogError(f"{path}: rollout {row['key']} does not match its checksum; restore the file from a copy")
    return Rollout(
        key=row["key"],
        prompt_id=row["prompt_id"],
        group=row["group"],
        sample=row["sample"],
        task=row["task"],
        token_ids=np.frombuffer(row["token_ids"], "<i4"),
        prompt_length=row["prompt_length"],
        loss_mask=np.frombuffer(row["loss_mask"], "u1"),
        behavior_logprob=np.frombuffer(row["behavior_logprob"], "<f4"),
        spans=tuple(Span(*span) for span in json.loads(row["spans"])),
        finish=row["finish"],
        status=row["status"],
        reward=row["reward"],
        reward_detail=json.loads(row["reward_detail"]),
        finished_ns=row["finished_ns"],
    )
