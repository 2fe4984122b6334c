"""Feeds events to the core and carries out its commands, in order. It decides nothing.

Every event and command goes to `events.jsonl` of the run, so that a run replays to the identical commands.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from oapl_engine.scheduler import core
from oapl_engine.scheduler import events as e

Handler = Callable[[Any], "e.Event | None"]


def drive(
    state: core.State,
    inbox: queue.SimpleQueue[e.Event],
    handlers: Mapping[type, Handler],
    record: Path | None = None,
) -> tuple[core.State, int]:
    """Run until Exit; returns the last state and the exit code.

    A handler carries out one command and returns the event that it caused at once, if any; other threads put their
    events into `inbox`.
    """
    pending: list[e.Event] = []
    with open(record, "a") if record else _Nowhere() as stream:
        while True:
            event = _next_event(inbox, pending)
            state, commands = core.step(state, event)
            _write(stream, "event", event)
            for command in commands:
                _write(stream, "command", command)
                if isinstance(command, e.Exit):
                    return state, command.code
                caused = handlers[type(command)](command)
                if caused is not None:
                    pending.append(caused)


def _next_event(inbox: queue.SimpleQueue[e.Event], pending: list[e.Event]) -> e.Event:
    """What others said comes first: a Stop must not wait behind a trainer that is never idle."""
    try:
        return inbox.get_nowait()
    except queue.Empty:
        return pending.pop(0) if pending else inbox.get()


def _write(stream: Any, kind: str, message: Any) -> None:
    row = {"kind": kind, "name": type(message).__name__, **msgspec.to_builtins(message)}
    stream.write(msgspec.json.encode(row).decode() + "\n")
    stream.flush()


def read_record(path: Path) -> list[e.Event | e.Command]:
    """The events and commands of a run, in order, as objects."""
    messages = []
    for line in path.read_text().splitlines():
        row = msgspec.json.decode(line)
        kind = getattr(e, row.pop("name"))
        row.pop("kind")
        messages.append(msgspec.convert(row, kind))
    return messages


class _Nowhere:
    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def write(self, _: str) -> None:
        return None

    def flush(self) -> None:
        return None
