"""One order of events for all ranks: each runs the same core on it, so all carry out the same commands.

Ranks meet in rounds. In a round everyone tells what it heard and what it answered; rank 0's events come first, then
those of rank 1, and so on. No rank decides anything that the others do not decide too.
"""

import contextlib
import queue
from collections.abc import Callable, Sequence

from oapl_engine.distributed import Ranks
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.driver import Inbox, waiting_in

ROUND_SECONDS = 0.02  # between rounds in which nobody had anything to tell


def listener(ranks: Ranks) -> Callable[[Inbox, list[e.Event | None]], list[e.Event]]:
    """`listen` for driver.drive on several ranks."""

    def listen(inbox: Inbox, answers: list[e.Event | None]) -> list[e.Event]:
        while True:
            own = waiting_in(inbox) or ([] if answers else _wait(inbox))
            told = {"heard": [e.to_row(x) for x in own], "answers": [x and e.to_row(x) for x in answers]}
            everyone = ranks.gather(told)
            events = [e.from_row(row) for rank in everyone for row in rank["heard"]]
            events += [x for x in map(_one_answer, zip(*(rank["answers"] for rank in everyone), strict=True)) if x]
            if events:
                return events
            answers = []

    return listen


def _wait(inbox: Inbox) -> list[e.Event]:
    with contextlib.suppress(queue.Empty):
        return [inbox.get(timeout=ROUND_SECONDS)]
    return []


def _one_answer(rows: Sequence[dict | None]) -> e.Event | None:
    """What all ranks together answer to one command: a refusal if one refused, nothing done only if nobody did it."""
    answers: list[e.Event] = [e.from_row(row) for row in rows if row]
    refused = [answer for answer in answers if isinstance(answer, e.PublishFailed)]
    done = [answer for answer in answers if not isinstance(answer, e.Interrupted)]
    return next(iter([*refused, *done, *answers]), None)
