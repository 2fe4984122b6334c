"""The machine on which runs took place, from their records: what the simulator needs to predict others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.simulate import Machine


def fit_machine(records: Iterable[list[tuple[float, e.Message]]], group_size: int, slots: int = 256) -> Machine:
    """The machine on which these runs took place, from their timed records (driver.read_record).

    Costs are means over the runs. Engine speed comes from bursts of generation: a Submit into idle engines until its
    last group; from bursts of different size also how sequences slow each other down.
    """
    costs: dict[str, list[float]] = {}
    bursts: list[tuple[float, float]] = []
    tokens: list[int] = []
    for record in records:
        for (begin, message), (end, _) in itertools.pairwise(record):
            if isinstance(message, e.Command) and not isinstance(message, e.Submit | e.Exit):
                costs.setdefault(type(message).__name__, []).append(end - begin)
        bursts += list(_bursts(record, group_size, slots))
        tokens += [m.tokens for _, m in record if isinstance(m, e.GroupDone)]
    running, seconds = np.array(bursts).T
    slope, base = np.polyfit(running, seconds, 1) if np.ptp(running) else (0.0, float(seconds.mean()))
    return Machine(
        engines=1,
        slots=slots,
        token_seconds=float(base),
        crowding=float(slope),
        costs={name: float(np.mean(values)) for name, values in costs.items()},
        group_size=group_size,
        tokens_mean=float(np.mean(tokens)) / group_size,
    )


def _bursts(record: list[tuple[float, e.Message]], group_size: int, slots: int) -> Iterable[tuple[float, float]]:
    """(sequences that ran at the same time, seconds per token of one sequence) of every burst of generation."""
    begin, in_flight, groups, tokens = 0.0, 0, 0, 0
    for at, message in record:
        if isinstance(message, e.Submit):
            begin = begin if in_flight else at
            in_flight, groups = in_flight + message.n, groups + message.n
        elif isinstance(message, e.GroupDone | e.GroupInvalid) and in_flight:
            in_flight -= 1
            tokens += getattr(message, "tokens", 0)
            at = getattr(message, "done_at", 0.0) or at
            if not in_flight:
                running = min(slots, groups * group_size)
                yield running, (at - begin) * running / max(1, tokens)
                groups, tokens = 0, 0
