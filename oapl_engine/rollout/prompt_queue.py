"""Which prompt comes next: retries first, then this rank's positions of the order, without what a log has already."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from oapl_engine.distributed import Ranks
from oapl_engine.samples import Prompt, group_key


class PromptOrder(Protocol):
    """What a queue asks of a data.task.Task."""

    def prompt(self, position: int) -> Prompt: ...
    def epoch(self, position: int) -> int: ...


@dataclass(frozen=True)
class Attempt:
    """A prompt admitted at `position` of the order, for the attempt-th time, to engine `incarnation`."""

    prompt: Prompt
    position: int
    attempt: int
    incarnation: int = 0


class PromptQueue:
    """Prompts of this rank that are to be generated, and those in flight. Safe to use from several threads.

    order:     prompt and epoch by position
    position:  the first position that a run, resumed or not, has to look at
    logged:    ids of groups that a resumed run has in its log already; their prompts are passed over
    """

    def __init__(self, order: PromptOrder, position: int, logged: Iterable[str], ranks: Ranks) -> None:
        self._order = order
        self._position = position
        self._logged = frozenset(logged)
        self._ranks = ranks
        self._retries: list[Attempt] = []
        self._in_flight: dict[str, Attempt] = {}
        self._lock = threading.Lock()

    def admit(self, incarnation: int) -> tuple[str, Attempt]:
        """(group id, attempt) of the next prompt, from now on in flight on engine `incarnation`."""
        with self._lock:
            attempt = replace(self._retries.pop(0) if self._retries else self._next(), incarnation=incarnation)
            key = self._key(attempt)
            self._in_flight[key] = attempt
            return key, attempt

    def end(self, key: str) -> Attempt:
        """The attempt of a group that is no longer in flight."""
        with self._lock:
            return self._in_flight.pop(key)

    def retry(self, attempt: Attempt) -> None:
        """Once: a prompt that kills engines must not kill them all."""
        if attempt.attempt == 0:
            with self._lock:
                self._retries.append(replace(attempt, attempt=1))

    def in_flight(self) -> int:
        with self._lock:
            return len(self._in_flight)

    def first_unfinished(self) -> int:
        """Position from which a resumed run must look for prompts: none before it is still to be generated."""
        with self._lock:
            open_attempts = (*self._in_flight.values(), *self._retries)
            return min([attempt.position for attempt in open_attempts], default=self._position)

    def _next(self) -> Attempt:
        while True:
            position, self._position = self._position, self._position + 1
            if position % self._ranks.world != self._ranks.rank:  # ranks take positions in turn
                continue
            attempt = Attempt(self._order.prompt(position), position, 0)
            if self._key(attempt) not in self._logged:
                return attempt

    def _key(self, attempt: Attempt) -> str:
        return group_key(self._order.epoch(attempt.position), attempt.prompt.id, attempt.attempt)
