"""SQLite opened the durable way: WAL where the file system is local, a rollback journal on network file systems."""

import sqlite3
from pathlib import Path

from oapl_engine.config import RunError

NETWORK = ("nfs", "nfs4", "lustre", "cifs", "smb3", "fuse.sshfs", "beegfs", "gpfs", "ceph")


class LogDamaged(RunError):
    """A stored row or file does not match its checksum, or is no database."""


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """Connection with `schema` applied; every commit is on disk when it returns (synchronous=FULL)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        if file_system(path) in NETWORK:
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("PRAGMA journal_mode=DELETE")
        else:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.executescript(schema)
    except sqlite3.DatabaseError as error:
        raise LogDamaged(f"{path}: {error}; move the file away to start anew, or restore it from a copy") from error
    return connection


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`, from the kernel's mount table; "" where there is none."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    target = str(path.resolve())
    rows = [line.split() for line in mounts.read_text().splitlines()]
    inside = [(r[1], r[2]) for r in rows if target == r[1] or target.startswith(r[1].rstrip("/") + "/")]
    return max(inside, key=lambda row: len(row[0]))[1] if inside else ""
