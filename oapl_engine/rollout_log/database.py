"""SQLite opened the durable way: WAL where the file system is local, a rollback journal on network file systems."""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import psutil

from oapl_engine.errors import ConfigError, RunError
from oapl_engine.files import describe_full_disk, is_full

SCHEMA_VERSION = 2  # of log and journal; stored as PRAGMA user_version. 1: oapl-engine 0.1, which left it at 0
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "cifs", "smb3", "fuse.sshfs", "beegfs", "gpfs", "ceph")


class CorruptLogError(ConfigError):
    """A stored row or file does not match its checksum, is not a database, or is one of another version."""


Connect = Callable[[Path, str], sqlite3.Connection]  # file, schema


def connect_writer(path: Path, schema: str) -> sqlite3.Connection:
    """File and tables are made where they are missing; what is committed is on disk (synchronous=FULL)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    _check_version(db, path)
    if file_system(path) in NETWORK_FILE_SYSTEMS:
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA journal_mode=DELETE")
    else:
        db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    # in one transaction: tables without their version would be taken for those of another version
    db.executescript(f"BEGIN IMMEDIATE; {schema} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
    return db


def connect_reader(path: Path, _: str = "") -> sqlite3.Connection:
    """Nothing is made or changed, so that it may lie on a read-only file system, or be another user's.

    A process that writes, or was killed, leaves its -wal or -journal: then SQLite's locks are needed, and its shared
    memory (-shm) beside the file. Without them the file holds everything, and immutable=1 asks for neither.
    """
    written = any(_size(path.with_name(path.name + end)) for end in ("-wal", "-journal"))
    mode = "mode=ro" if written else "mode=ro&immutable=1"
    db = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, check_same_thread=False, isolation_level=None)
    _check_version(db, path)
    return db


class Database:
    """A file with the tables of `schema`. path: where it is.

    Safe to use from several threads, one writer at a time. Rows are read as sqlite3.Row. Raises CorruptLogError where
    the file is not a database of this version or is damaged, RunError where the system does not let it be used.
    """

    schema = ""

    def __init__(self, path: str | Path, connect: Connect = connect_writer) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        with self._named_errors():
            self._db = connect(self.path, self.schema)
            self._db.row_factory = sqlite3.Row

    @classmethod
    def reading(cls, path: str | Path) -> Self:
        """For reports and exports, also while another process writes the file: see connect_reader."""
        return cls(path, connect_reader)

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock, self._named_errors():
            return self._db.execute(query, values).fetchall()

    def write(self, *statements: tuple[str, Sequence[tuple]]) -> None:
        """Each statement with each of its rows, in one transaction: all of it, or nothing. sqlite3.IntegrityError where
        a row is there already."""
        with self._lock, self._named_errors(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for statement, rows in statements:
                self._db.executemany(statement, rows)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except sqlite3.OperationalError as error:
            if is_full(self.path):
                raise RunError(describe_full_disk(self.path)) from error
            raise RunError(
                f"{self.path}: {error}; free disk space, check that you may read it (a run: and write it), and keep "
                "the -wal and -shm files that a killed run left beside it"
            ) from error
        except sqlite3.DatabaseError as error:
            raise CorruptLogError(
                f"{self.path}: {error}; move the file away to start anew, or restore it from a copy"
            ) from error


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if tables and version != SCHEMA_VERSION:
        db.close()
        raise CorruptLogError(
            f"{path} has schema {version or 1}, this version of oapl-engine reads {SCHEMA_VERSION}: start in a new "
            "run.dir, or export the run with the version that wrote it (oapl rollouts)"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`; "" where the system does not tell."""
    target = path.resolve()
    inside = [part for part in psutil.disk_partitions(all=True) if target.is_relative_to(part.mountpoint)]
    return max(inside, key=lambda part: len(part.mountpoint)).fstype if inside else ""
