"""Feeds events to the core and carries out its commands, in order. It decides nothing.

Every event and command goes to `events.jsonl` of the run, so that a run replays to the identical commands.
"""

import contextlib
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from oapl_engine.scheduler import core
from oapl_engine.scheduler import events as e

Handler = Callable[[Any], "e.Event | None"]
Message = e.Event | e.Command


class Inbox(Protocol):
    """A queue.SimpleQueue, or one of virtual time."""

    def get(self, block: bool = ..., timeout: float | None = ...) -> e.Event: ...
    def get_nowait(self) -> e.Event: ...


def drive(
    state: core.State,
    inbox: Inbox,
    handlers: Mapping[type, Handler],
    record: Path | None = None,
    listen: Callable[[Any, list[e.Event | None]], list[e.Event]] | None = None,
) -> tuple[core.State, int]:
    """Run until Exit; returns the last state and the exit code.

    A handler carries out one command and returns its answer, the event that it caused at once, if any; other threads
    put their events into `inbox`. listen(inbox, answers): the next events in order; by default those of this process.
    """
    answers: list[e.Event | None] = []
    with _recorder(record) as write:
        while True:
            events, answers = (listen or heard)(inbox, answers), []
            for event in events:
                state, commands = core.step(state, event)
                write(event)
                for command in commands:
                    write(command)
                    if isinstance(command, e.Exit):
                        return state, command.code
                    answers.append(handlers[type(command)](command))


def heard(inbox: Inbox, answers: list[e.Event | None]) -> list[e.Event]:
    """What others said comes first: a Stop must not wait behind a trainer that is never idle. Waits for an event."""
    said = waiting_in(inbox)
    caused = [answer for answer in answers if answer is not None]
    return said + caused or [inbox.get()]


def waiting_in(inbox: Inbox) -> list[e.Event]:
    """Everything that is in the inbox now."""
    events: list[e.Event] = []
    with contextlib.suppress(queue.Empty):
        while True:
            events.append(inbox.get_nowait())
    return events


def replay(state: core.State, messages: Iterable[Message]) -> list[e.Command]:
    """The commands that the events among `messages` give."""
    said: list[e.Command] = []
    for event in messages:
        if not isinstance(event, e.Command):
            state, commands = core.step(state, event)
            said += commands
    return said


@contextlib.contextmanager
def _recorder(path: Path | None) -> Iterator[Callable[[Message], None]]:
    """write(message): a line, with the time in seconds since the epoch."""
    if path is None:
        yield lambda message: None
        return
    with open(path, "ab") as stream:

        def write(message: Message) -> None:
            kind = "command" if isinstance(message, e.Command) else "event"
            row = {"at": round(time.time(), 4), "kind": kind, **e.to_row(message)}
            stream.write(msgspec.json.encode(row) + b"\n")
            stream.flush()

        yield write


def read_record(path: Path) -> list[Message]:
    """The events and commands of a run, in order, as objects."""
    return [message for _, message in read_timed_record(path)]


def read_timed_record(path: Path) -> list[tuple[float, Message]]:
    """(seconds since the epoch, message): when an event was heard, or a command began."""
    rows = [msgspec.json.decode(line) for line in path.read_text().splitlines()]
    return [(row.get("at", 0.0), e.from_row(row)) for row in rows]
