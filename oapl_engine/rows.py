"""Rows of files that people bring, for prompts and finished rollouts alike: JSON objects, one per line or in one array,
gzipped or not, with a byte-order mark or without.

What Python's json would change or drop in silence is an error that names file and line: of two equal keys the first,
numbers that no float holds, half a surrogate pair.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from oapl_engine.errors import ConfigError, nearest

Row = tuple[str, int, dict[str, Any]]  # place ("FILE, line 3"), number of the line (in an array: of the object), object
MARK = b"\xef\xbb\xbf"  # byte-order mark of UTF-8
GZIP = b"\x1f\x8b"
SPACE = re.compile(r"[ \t\r\n]*")


def check_file(file: Path) -> None:
    """Raises ConfigError where data.path = `file` is not a file."""
    if file.is_dir():
        raise ConfigError(f"data.path = {file} is a directory: name a file")
    if not file.exists():
        siblings = [path.name for path in file.parent.glob("*") if path.is_file()]
        hint = f"; {nearest(file.name, siblings)}" if siblings else ""
        raise ConfigError(f"data.path = {file} does not exist{hint}")


def row_decoder(parse_int: Callable[[str], Any] = int, parse_float: Callable[[str], Any] = float) -> json.JSONDecoder:
    """Decoder for `read_json_rows`. The two functions get a number as it is written, and raise ValueError."""
    return json.JSONDecoder(
        object_pairs_hook=_make_object,
        parse_int=parse_int,
        parse_float=parse_float,
        parse_constant=_refuse_constant,
    )


def read_json_rows(file: Path, decoder: json.JSONDecoder) -> Iterator[Row]:
    """Every object of a file, in order; nothing where there is none. Lines are read one at a time, an array at once.

    Raises ConfigError that names data.path, or file and line.
    """
    check_file(file)
    try:
        with ExitStack() as stack:
            stream: io.BufferedReader | gzip.GzipFile = stack.enter_context(open(file, "rb"))
            if stream.peek(2).startswith(GZIP):
                stream = stack.enter_context(gzip.open(stream))
            if stream.peek(1).removeprefix(MARK).lstrip().startswith(b"["):
                yield from _array_rows(_decode(stream.read().removeprefix(MARK), file, 1), file, decoder)
            else:
                yield from _line_rows(stream, file, decoder)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"data.path = {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def check_messages(messages: Any, place: str, field: str) -> tuple[dict[str, Any], ...]:
    """The messages of a prompt that is a chat, without fields that are null: Parquet fills those in.

    Raises ConfigError where it is not a list of objects whose role and content are texts, and where the last message is
    the assistant's: nothing would be left to answer.
    """
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'{place}: "{field}" must be a text or a list of messages, and not empty')
    for number, message in enumerate(messages, 1):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise ConfigError(f'{place}: message {number} of "{field}" must be an object whose "{name}" is a text')
    if messages[-1]["role"] == "assistant":
        raise ConfigError(f'{place}: "{field}" ends with the assistant\'s message: a prompt ends before the response')
    return tuple({name: value for name, value in message.items() if value is not None} for message in messages)


def _line_rows(lines: Iterable[bytes], file: Path, decoder: json.JSONDecoder) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(MARK) if number == 1 else line
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        text = _decode(line, file, number)
        row, end = _parse(text, _skip(text, 0), place, decoder)
        rest = text[end:].strip()
        if rest:
            raise ConfigError(f"{place}: not JSON: {rest[:20]!r} follows the object; write one object per line")
        yield place, number, row


def _array_rows(text: str, file: Path, decoder: json.JSONDecoder) -> Iterator[Row]:
    """Object by object, so that an error names the line where its object starts."""
    counted, line, number = 0, 1, 0
    position = _skip(text, text.index("[") + 1)
    while not text.startswith("]", position):
        number += 1
        line += text.count("\n", counted, position)
        counted = position
        place = f"{file}, line {line}"
        row, end = _parse(text, position, place, decoder)
        yield place, number, row
        position = _skip(text, end)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif not text.startswith("]", position):
            raise ConfigError(f'{place}: not JSON: neither a comma nor "]" follows the object that starts here')
    rest = text[position + 1 :].strip()
    if rest:
        raise ConfigError(f"{file}: not JSON: {rest[:20]!r} follows the array")


def _decode(data: bytes, file: Path, line: int) -> str:
    """`data`, which starts at this line of the file, as text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line += before.count(b"\n")
        column = len(before) - before.rfind(b"\n") - 1
        raise ConfigError(
            f"{file}, line {line}: not UTF-8 (byte {column} of the line); save the file as UTF-8"
        ) from error


def _parse(text: str, start: int, place: str, decoder: json.JSONDecoder) -> tuple[dict[str, Any], int]:
    """The object at this position of the text, and the position after it."""
    try:
        row, end = decoder.raw_decode(text, start)
        if text.find("\\u", start, end) >= 0:  # half a surrogate pair comes from an escape alone
            json.dumps(row, ensure_ascii=False, default=str).encode()
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: not JSON: {error.msg} (character {error.pos - start + 1})") from error
    except RecursionError as error:
        raise ConfigError(f"{place}: lists and objects are nested too deep") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ConfigError(f"{place}: {half} is half a surrogate pair, not a character: write it anew") from error
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f'{place}: must be an object like {{"name": value, …}}, not {type(row).__name__}')
    return row, end


def _skip(text: str, position: int) -> int:
    """The next position that is not white space."""
    return SPACE.match(text, position).end()  # type: ignore[union-attr]  # matches nothing, too


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        names_in_order = [name for name, _ in pairs]
        twice = next(name for name in names if names_in_order.count(name) > 1)
        raise ValueError(f'the key "{twice}" is there twice: which value counts?')
    return names


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
