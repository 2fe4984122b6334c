"""Feeds events to the core and carries out its commands, in order. It decides nothing.

Every event and command goes to `events.jsonl` of the run, so that a run replays to the identical commands.
"""

import contextlib
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from oapl_engine.errors import ConfigError
from oapl_engine.files import open_jsonl, read_jsonl
from oapl_engine.scheduler import core
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.state import State

Handler = Callable[[Any], "e.Event | None"]
Answers = list["e.Event | None"]


class Inbox(Protocol):
    """A queue.SimpleQueue, or one of virtual time."""

    def get(self, block: bool = ..., timeout: float | None = ...) -> e.Event: ...
    def get_nowait(self) -> e.Event: ...


def drive(
    state: State,
    inbox: Inbox,
    handlers: Mapping[type, Sequence[Handler]],
    record: Path | None = None,
    next_events: "Callable[[Any, Answers], list[e.Event]] | None" = None,
) -> tuple[State, int]:
    """Run until Exit; returns the last state and the exit code.

    inbox:        where other threads put their events
    handlers:     by command, in the order in which they carry it out; each returns its answer, the event that it
                  caused immediately, if any. Several where one prepares what the next one does: what must be read from
                  the policy on its device stands before the one that moves it away
    record:       file that every message is appended to
    next_events:  (inbox, answers) -> the next events in order; by default those of this process
    """
    answers: Answers = []
    with _recorder(record) as write:
        while True:
            events, answers = (next_events or own_events)(inbox, answers), []
            for event in events:
                state, commands = core.step(state, event)
                write(event)
                for command in commands:
                    write(command)
                    if isinstance(command, e.Exit):
                        return state, command.code
                    answers.append(_carry_out(command, handlers[type(command)]))


def _carry_out(command: e.Command, handlers: Sequence[Handler]) -> e.Event | None:
    """The answer of the last handler that has one."""
    answer = None
    for handler in handlers:
        answer = handler(command) or answer
    return answer


def own_events(inbox: Inbox, answers: Answers) -> list[e.Event]:
    """What other threads reported, then the answers: a Stop must not wait behind a busy trainer. Waits for an event."""
    reported = drain_queue(inbox)
    caused = [answer for answer in answers if answer is not None]
    return reported + caused or [inbox.get()]


def drain_queue(inbox: Inbox) -> list[e.Event]:
    """Everything that is in the inbox now."""
    events: list[e.Event] = []
    with contextlib.suppress(queue.Empty):
        while True:
            events.append(inbox.get_nowait())
    return events


def replay(state: State, messages: Iterable[e.Message]) -> list[e.Command]:
    """The commands that the events among `messages` give."""
    said: list[e.Command] = []
    for event in messages:
        if isinstance(event, e.Event):
            state, commands = core.step(state, event)
            said += commands
    return said


@contextlib.contextmanager
def _recorder(path: Path | None) -> Iterator[Callable[[e.Message], None]]:
    """write(message): a line, with the time in seconds since the epoch."""
    if path is None:
        yield lambda message: None
        return
    with open_jsonl(path) as stream:

        def write(message: e.Message) -> None:
            kind = "command" if isinstance(message, e.Command) else "event"
            row = {"at": round(time.time(), 4), "kind": kind, **msgspec.to_builtins(message)}
            stream.write(msgspec.json.encode(row) + b"\n")
            stream.flush()

        yield write


def read_record(path: Path) -> list[tuple[float, Any]]:
    """(seconds since the epoch, event or command) of a run, in order: when it was heard, or began.

    Raises ConfigError for a line that this version does not know.
    """
    found = []
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            message = msgspec.convert(row, e.ANY)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{path} line {number}: {error}; it was recorded by another version") from error
        found.append((row.get("at", 0.0), message))
    return found
