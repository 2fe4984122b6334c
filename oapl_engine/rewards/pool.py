"""Verifier processes that can be killed: one that hangs, dies, forks or prints costs its own verdict only."""

import asyncio
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import psutil

from oapl_engine.rewards.frames import read_frame, write_frame
from oapl_engine.rewards.verdict import Verdict, check_verifier

STARTUP_SECONDS = 300.0  # a process start and the verifier's imports, on a machine under load


class VerifierPool:
    """`workers` processes that verify, each verdict within `timeout_seconds` and `memory_mb` of added address space.

    The processes are fresh Python (no torch, nothing forked from the trainer) and end with this one, also by SIGKILL.
    Thread-safe. To be closed.
    """

    def __init__(self, workers: int = 1, timeout_seconds: float = 10.0, memory_mb: int = 1024) -> None:
        self._timeout, self._memory = timeout_seconds, memory_mb
        self._lock, self._closed = threading.Lock(), False
        self._workers = [_Worker() for _ in range(workers)]
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(workers):
            self._idle.put(slot)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")

    async def verify(
        self, name: str, response: str, record: dict[str, Any], options: dict[str, Any] | None = None
    ) -> Verdict:
        """Like `rewards.verify`, in a worker. Raises ConfigError on an unknown name or option."""
        return await asyncio.wrap_future(self._submit(name, response, record, options or {}))

    def verify_many(
        self, name: str, items: Sequence[tuple[str, dict[str, Any]]], options: dict[str, Any] | None = None
    ) -> list[Verdict]:
        """Verdicts on (response, record) pairs, in their order, on all workers."""
        return [f.result() for f in [self._submit(name, *item, options or {}) for item in items]]

    def close(self) -> None:
        """Kills the workers; verdicts that were under way become errors. Nothing is left running."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, name: str, response: str, record: dict[str, Any], options: dict[str, Any]) -> Future[Verdict]:
        check_verifier(name, options)
        request = {"name": name, "response": response, "record": record, "options": options, "memory_mb": self._memory}
        return self._threads.submit(self._run, request)

    def _run(self, request: dict[str, Any]) -> Verdict:
        slot = self._idle.get()
        try:
            verdict, reusable = self._workers[slot].ask(request, self._timeout)
            if not reusable:
                self._replace(slot)
            return verdict
        finally:
            self._idle.put(slot)

    def _replace(self, slot: int) -> None:
        with self._lock:
            self._workers[slot].kill()
            self._workers[slot].close()
            if not self._closed:
                self._workers[slot] = _Worker()


class _Worker:
    def __init__(self) -> None:
        request_fd, self._request = os.pipe()
        self._reply, reply_fd = os.pipe()
        lifeline_fd, lifeline = os.pipe()
        self._fds: tuple[int, ...] = (self._request, self._reply, lifeline)
        fds = (request_fd, reply_fd, lifeline_fd)
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "oapl_engine.rewards.worker", *map(str, fds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=fds,
            start_new_session=True,
        )
        for fd in fds:
            os.close(fd)

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[Verdict, bool]:
        """The verdict, and whether the worker may be asked again."""
        limit = f"{STARTUP_SECONDS:g} s: the verifier did not start"
        try:
            write_frame(self._request, request)
            read_frame(self._reply, STARTUP_SECONDS)
            limit = f"{seconds:g} s (reward.timeout_seconds)"
            reply = read_frame(self._reply, seconds)
        except TimeoutError:
            return Verdict("invalid", None, {"reason": f"no verdict after {limit}"}), False
        except (EOFError, OSError, ValueError) as error:
            return Verdict("error", None, {"reason": f"the verifier's process {self._end(error)}"}), False
        return Verdict(**reply["verdict"]), not reply["children"]

    def kill(self) -> None:
        """Ends the process and all that it started; a thread in `ask` then sees the end of its pipe."""
        descendants: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            descendants = psutil.Process(self._process.pid).children(recursive=True)
        for process in [*descendants, self._process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Closes the pipes: only when no thread is in `ask`, which would continue with a number that is reused."""
        for fd in self._fds:
            os.close(fd)
        self._fds, self._request, self._reply = (), -1, -1

    def _end(self, error: Exception) -> str:
        try:
            code = self._process.wait(1)  # the pipe ends a moment before the process
        except subprocess.TimeoutExpired:
            return f"broke the protocol: {error}"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
