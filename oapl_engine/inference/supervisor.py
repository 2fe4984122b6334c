"""Starts, watches, restarts and stops engine processes. Blocking; safe to use from any thread."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import msgspec
import psutil
import torch

from oapl_engine.errors import RunError
from oapl_engine.inference import protocol
from oapl_engine.inference.client import EngineClient
from oapl_engine.inference.engine_process import remove_traces
from oapl_engine.inference.environment import engine_environment
from oapl_engine.inference.options import EngineOptions, ProcessOptions

STOP_SECONDS = 10.0
LOG_TAIL = 30  # lines of the engine's log that an error shows
FOLDER_PREFIX = "oapl-engine-"


class EngineStartError(RunError):
    """The engine process ended, or said nothing, before it was ready. Shows the end of its log."""


class Engine:
    """One engine process that we own, started and serving when it is made.

    options:   what it was started with
    log_path:  its log is appended here
    on_lost:   called with the Engine, on a thread of its own, when the process ends without stop(); `lost` is set too
    client:    its EngineClient, another one after restart()

    Raises EngineStartError with the end of the log.
    """

    def __init__(
        self,
        options: EngineOptions,
        log_path: str | Path,
        on_lost: Callable[[Any], None] | None = None,
        start_seconds: float = 600.0,
    ) -> None:
        self.options = options
        self.log_path = Path(log_path)
        self.start_seconds = start_seconds
        self.lost = threading.Event()
        self._on_lost = on_lost
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """End the process and all that belongs to it, within STOP_SECONDS. Calling it again does nothing."""
        self._stopping = True
        with contextlib.suppress(OSError):  # already closed: the engine is gone
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._clean_up()
        if threading.current_thread() is not self._watch:  # on_lost runs there, and may restart
            self._watch.join()

    def restart(self) -> None:
        """A fresh process, incarnation + 1, with the weights of options.model: publish before it may serve a newer
        version. `client` is a new object afterwards."""
        self.stop()
        self.options = msgspec.structs.replace(self.options, incarnation=self.options.incarnation + 1)
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        reclaim_folders()
        self._stopping = False
        self.lost.clear()
        self._folder = tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-")
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = self._spawn(theirs.fileno())
        self._watch = threading.Thread(target=self._wait_for_end, name="watch-engine", daemon=True)
        self._watch.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()  # it does not listen yet
            self.stop()
            raise
        self.client = EngineClient(self._socket.dup(), self.options.incarnation)

    def _spawn(self, fd: int) -> subprocess.Popen[bytes]:
        options = ProcessOptions(self.options, fd, os.getpid(), self._folder)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "oapl_engine.inference.engine_process", msgspec.json.encode(options).decode()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=engine_environment(os.environ, self.options, self._folder, torch.cuda.device_count()),
                pass_fds=[fd],
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        self._socket.settimeout(self.start_seconds)
        begin = time.monotonic()
        try:
            head = self._socket.recv(protocol.LENGTH.size, socket.MSG_WAITALL)
            body = self._socket.recv(protocol.LENGTH.unpack(head)[0], socket.MSG_WAITALL) if head else b""
        except TimeoutError as error:
            raise EngineStartError(self._failure(f"did not get ready in {time.monotonic() - begin:.0f} s")) from error
        if not body:
            raise EngineStartError(self._failure("ended while it started"))
        self._socket.settimeout(None)

    def _failure(self, what: str) -> str:
        tail = "\n".join(self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:])
        return f"the engine for {self.options.model} {what}; the end of {self.log_path}:\n{tail}"

    def _wait_for_end(self) -> None:
        self._process.wait()
        if not self._stopping:
            self._clean_up()
            self.lost.set()
            if self._on_lost:
                self._on_lost(self)

    def _clean_up(self) -> None:
        """What is left in the engine's session (workers of a killed engine), and its folder."""
        kill_session(self._process.pid)
        remove_traces(self._folder)


def kill_session(session: int) -> None:
    """SIGKILL every process of a session but multiprocessing's resource tracker, which unlinks what the others left."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):  # it may end while we look
            if os.getsid(process.pid) == session and "resource_tracker" not in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)


def reclaim_folders() -> None:
    """Remove temporary folders of engines whose owner and engine were killed together."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        owner = folder.name.removeprefix(FOLDER_PREFIX).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            remove_traces(str(folder))
