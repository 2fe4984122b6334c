"""Seconds by activity: of a publish, and between two optimizer steps (the time/* of metrics.jsonl)."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

OVERLAPPING = ("verify",)  # summed over responses, while others generate


class Stopwatch:
    """Adds up wall-clock seconds by name until they are taken. seconds: by name, so far."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.monotonic()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """Seconds since the last take by metric name, with what nothing measured as idle; then starts from zero."""
        now = time.monotonic()
        total, self._last = now - self._last, now
        taken = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        idle = max(0.0, total - sum(s for name, s in self.seconds.items() if name not in OVERLAPPING))
        self.seconds.clear()
        return {**taken, "time/idle": idle, "time/step": total}
