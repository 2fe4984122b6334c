"""What happens to this rank's engine, reported to the scheduler."""

import queue
from collections.abc import Callable

from oapl_engine.inference.client import EngineLostError
from oapl_engine.scheduler import events as e


class EngineEvents:
    """Puts events of engine `engine` into the scheduler's inbox; all methods may be called from any thread.

    failure: what ended the run from another thread; raise_failure() raises it
    """

    def __init__(self, inbox: "queue.SimpleQueue[e.Event]", engine: int) -> None:
        self.inbox = inbox
        self.engine = engine
        self.failure: BaseException | None = None

    def ready(self) -> None:
        """The engine process is up, with weights that this run did not publish."""
        self.inbox.put(e.EngineReady(self.engine))

    def lost(self) -> None:
        """The engine process died."""
        self.inbox.put(e.EngineLost(self.engine))

    def fail(self, error: BaseException) -> None:
        """Something went wrong that the run cannot survive: it ends immediately."""
        self.failure = error
        self.inbox.put(e.Stop(now=True))

    def raise_failure(self) -> None:
        if self.failure:
            raise self.failure

    def run_or_interrupt(self, work: Callable[[], e.Event | None]) -> e.Event | None:
        """The answer of `work`, or Interrupted where the engine died meanwhile."""
        try:
            return work()
        except EngineLostError:
            self.lost()  # before the answer, whichever thread notices first
            return e.Interrupted()

    def run_if_alive(self, work: Callable[[], object]) -> None:
        """For commands that have no answer: a dead engine is reported, and nothing else happens."""
        try:
            work()
        except EngineLostError:
            self.lost()
