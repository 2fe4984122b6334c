"""Files of ours: JSON lines of which a kill may tear the last, texts that are replaced whole, rights as umask says."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from oapl_engine.errors import ConfigError, RunError

FULL_BYTES = 1 << 20  # free space below which a disk counts as full: SQLite calls it an I/O error too
BLOCK = 1 << 16  # bytes that are read at a time to find the last line


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a file that append_jsonl or open_jsonl wrote, in order; none where there is no file.

    A torn last line is left out: it is the trace of a kill, or another process is writing it. Raises ConfigError that
    names file and line where any other line is not an object.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        row = _parsed(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise ConfigError(
                f"{path} line {number} is damaged: {line[:60]!r} is not a JSON object; restore the file from a copy, "
                "or delete the line"
            )
    return rows


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add a line per row. A torn last line is cut off first."""
    with open_jsonl(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def open_jsonl(path: Path) -> BinaryIO:
    """The file, made where it is missing and opened for appending lines. A torn last line is cut off first."""
    file = open(path, "ab+")  # noqa: SIM115 (the caller closes it)
    _cut_torn_line(file)
    return file


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line, else None."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _cut_torn_line(file: BinaryIO) -> None:
    size = start = file.seek(0, os.SEEK_END)
    tail = b""
    while start and b"\n" not in tail[:-1]:
        length = min(start, BLOCK)
        start = file.seek(start - length)
        tail = file.read(length) + tail
    last = tail[tail.rfind(b"\n", 0, max(0, len(tail) - 1)) + 1 :]
    if last and _parsed(last) is None:
        file.truncate(size - len(last))
    file.seek(0, os.SEEK_END)


def read_json(path: Path) -> Any:
    """What a JSON file of ours holds. Raises ConfigError that names it where it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; restore it from a copy, or remove it") from error


def replace_text(path: Path, text: str) -> None:
    """Write a file whole: a kill leaves the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def follow_umask(folder: Path) -> None:
    """Give every file below a folder the rights that open() gives: safetensors writes its files for their owner alone,
    and a server that runs as another user could not load them. The folder's own rights, which mkdir gave it, say what
    umask is."""
    rights = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(rights)


def is_full(path: Path) -> bool:
    """Whether the disk that holds a path, which need not exist, has less than 1 MiB left."""
    folder = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(folder).free < FULL_BYTES


def describe_full_disk(path: Path) -> str:
    """What is said where nothing more can be written."""
    return (
        f"the disk that holds {path} is full: free some space and repeat the command, which continues from what was "
        "written before"
    )


@contextmanager
def name_disk_errors(path: Path) -> Iterator[None]:
    """Raises RunError, one line that names the path, where the disk that holds it is full or its quota is used up, and
    where the system does not let a file be read or written, as one that another user left."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(describe_full_disk(path)) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
            raise RunError(f"{error.filename}: {error.strerror}; check who owns it and what is below {path}") from error
        raise
