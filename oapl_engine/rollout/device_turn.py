"""Engine and trainer take turns on a device that cannot hold both."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceTurn:
    """Whose turn it is; at first the engine's. An engine, which takes its memory as it starts, starts in its own turn.

    All methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._engines = threading.Event()
        self._engines.set()
        self._starting = threading.Lock()

    def give_to_trainer(self) -> None:
        """From now on no engine starts; one that is starting is waited for."""
        with self._starting:
            self._engines.clear()

    def give_to_engine(self) -> None:
        self._engines.set()

    @contextmanager
    def engines(self) -> Iterator[None]:
        """Waits for the engine's turn, which lasts at least as long as the body of `with`."""
        while True:
            self._engines.wait()
            with self._starting:
                if self._engines.is_set():
                    yield
                    return
