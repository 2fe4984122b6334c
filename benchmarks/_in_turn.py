"""A publisher that does one thing at a time, for the row "in turn" of benchmarks/weights.py."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from oapl_engine.weights.control import Bucket, EngineControl, UpdateReply, UpdateRequest
from oapl_engine.weights.transports import Buckets


class InTurn:
    """An EngineControl that lets its publisher go on only when the engine has answered.

    A publisher packs a bucket while the engine takes the one before, and the trainer computes log-probs of the probe
    prompt while the engine does. Here a bucket is filled when the one before has been taken (follow), and the trainer
    begins when the engine has scored (wait_for_score).
    """

    def __init__(self, control: EngineControl) -> None:
        self.control = control
        self._taken = threading.Event()
        self._taken.set()
        self._scored = threading.Event()

    def pause(self, mode: str) -> None:
        self.control.pause(mode)

    def resume(self) -> None:
        self.control.resume()

    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        try:
            return self.control.score(token_ids)
        finally:
            self._scored.set()

    def update(self, request: UpdateRequest) -> UpdateReply:
        try:
            return self.control.update(request)
        finally:
            if isinstance(request, Bucket):
                self._taken.set()

    def wait_for_score(self) -> None:
        """Until the one probe prompt has been scored."""
        self._scored.wait()
        self._scored.clear()

    def follow(self, buckets: Buckets) -> Buckets:
        """The same buckets; wait() returns when the engine has answered for the one that was sent last."""
        return FollowedBuckets(buckets, self._taken)


class FollowedBuckets(Buckets):
    """Buckets of another transport, one on its way at a time. taken: set when the engine answered for the last one."""

    def __init__(self, buckets: Buckets, taken: threading.Event) -> None:
        self.buckets, self.taken = buckets, taken
        self.views, self.transport = buckets.views, buckets.transport
        self.describe, self.close = buckets.describe, buckets.close  # type: ignore[method-assign]

    def send(self, index: int, length: int) -> None:
        self.taken.clear()
        self.buckets.send(index, length)

    def wait(self, index: int) -> None:
        self.taken.wait()
        self.buckets.wait(index)
