"""SQLite opened the durable way: WAL where the file system is local, a rollback journal on network file systems."""

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from oapl_engine.errors import RunError

NETWORK = ("nfs", "nfs4", "lustre", "cifs", "smb3", "fuse.sshfs", "beegfs", "gpfs", "ceph")


class CorruptLogError(RunError):
    """A stored row or file does not match its checksum, or is no database."""


class Database:
    """A file with `schema` applied; what was committed is on disk (synchronous=FULL). Safe to use from several threads,
    one writer at a time. Raises CorruptLogError where the file is no database."""

    def __init__(self, path: Path, schema: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            if file_system(path) in NETWORK:
                self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
                self._db.execute("PRAGMA journal_mode=DELETE")
            else:
                self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(schema)
        except sqlite3.DatabaseError as error:
            raise CorruptLogError(
                f"{path}: {error}; move the file away to start anew, or restore it from a copy"
            ) from error

    def rows(self, query: str, *values: object) -> list[tuple]:
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


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`, from the kernel's mount table; "" where there is none."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    target = str(path.resolve())
    rows = [line.split() for line in mounts.read_text().splitlines()]
    inside = [(r[1], r[2]) for r in rows if target == r[1] or target.startswith(r[1].rstrip("/") + "/")]
    return max(inside, key=lambda row: len(row[0]))[1] if inside else ""
