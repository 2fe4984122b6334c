"""SQLite opened the durable way: WAL where the file system is local, a rollback journal on network file systems."""

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

from oapl_engine.errors import RunError

SCHEMA_VERSION = 2  # of log and journal; stored as PRAGMA user_version. 1: oapl-engine 0.1, which left it at 0
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "cifs", "smb3", "fuse.sshfs", "beegfs", "gpfs", "ceph")


class CorruptLogError(RunError):
    """A stored row or file does not match its checksum, is not a database, or is one of another version."""


class Database:
    """A file with `schema` applied; what was committed is on disk (synchronous=FULL).

    Safe to use from several threads, one writer at a time. Rows are read as sqlite3.Row. Raises CorruptLogError where
    the file is not a database of this version.
    """

    def __init__(self, path: Path, schema: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            self._check_version(path)
            if file_system(path) in NETWORK_FILE_SYSTEMS:
                self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
                self._db.execute("PRAGMA journal_mode=DELETE")
            else:
                self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(schema)
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except sqlite3.DatabaseError as error:
            raise CorruptLogError(
                f"{path}: {error}; move the file away to start anew, or restore it from a copy"
            ) from error

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def write(self, *statements: tuple[str, Sequence[tuple]]) -> None:
        """Each statement with each of its rows, in one transaction: all of it, or nothing."""
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for statement, rows in statements:
                self._db.executemany(statement, rows)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _check_version(self, path: Path) -> None:
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if tables and version != SCHEMA_VERSION:
            self._db.close()
            raise CorruptLogError(
                f"{path} has schema {version or 1}, this version of oapl-engine reads {SCHEMA_VERSION}: start in a new "
                "run.dir, or export the run with the version that wrote it (oapl rollouts)"
            )


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`; "" where the system does not tell."""
    target = path.resolve()
    inside = [part for part in psutil.disk_partitions(all=True) if target.is_relative_to(part.mountpoint)]
    return max(inside, key=lambda part: len(part.mountpoint)).fstype if inside else ""
