"""One order of events for all ranks: each runs the same core on it, so all carry out the same commands.

Ranks meet in rounds. In a round each rank reports the events that it heard and the answers of its handlers; rank 0's
events come first, then those of rank 1, and so on. No rank decides anything that the others do not decide too.
"""

import contextlib
import queue
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from oapl_engine.distributed import Ranks
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.driver import Answers, Inbox, drain_queue

ROUND_SECONDS = 0.02  # between rounds in which no rank had anything to report


def lockstep_events(ranks: Ranks) -> Callable[[Inbox, Answers], list[e.Event]]:
    """`next_events` for driver.drive on several ranks."""

    def next_events(inbox: Inbox, answers: Answers) -> list[e.Event]:
        while True:
            own = drain_queue(inbox) or ([] if answers else _wait(inbox))
            rows = ranks.gather(msgspec.to_builtins({"heard": own, "answers": answers}))
            events = [_message(row) for rank in rows for row in rank["heard"]]
            by_command = zip(*(rank["answers"] for rank in rows), strict=True)
            events += [answer for answer in map(merge_answers, by_command) if answer]
            if events:
                return events
            answers = []

    return next_events


def merge_answers(rows: Sequence[dict | None]) -> e.Event | None:
    """What all ranks together answer to one command: a refusal if one refused, Interrupted only if all were."""
    answers: list[e.Event] = [_message(row) for row in rows if row]
    refused = [answer for answer in answers if isinstance(answer, e.PublishFailed)]
    done = [answer for answer in answers if not isinstance(answer, e.Interrupted)]
    return next(iter([*refused, *done, *answers]), None)


def _message(row: dict[str, Any]) -> e.Event:
    event: e.Event = msgspec.convert(row, e.ANY)
    return event


def _wait(inbox: Inbox) -> list[e.Event]:
    with contextlib.suppress(queue.Empty):
        return [inbox.get(timeout=ROUND_SECONDS)]
    return []
