"""A verifier process: `python -m oapl_engine.rewards.worker REQUEST_FD REPLY_FD LIFELINE_FD`, started by the pool.

For each request it replies {"started": true} once the verifier is imported (the time-out counts from there), then the
verdict. It ends with its owner, also in the middle of a verdict.
"""

import ctypes
import dataclasses
import fcntl
import os
import resource
import select
import signal
import sys
from pathlib import Path
from typing import Any

from oapl_engine.rewards.frames import read_frame, write_frame
from oapl_engine.rewards.verdict import Verdict, load_verifier, verify

PR_SET_CHILD_SUBREAPER = 36
MAX_DETAIL = 1 << 20


def main(request_fd: int, reply_fd: int, lifeline_fd: int) -> None:
    _die_with_owner(lifeline_fd)
    # orphans of a verifier's forks become our children, so that they are found
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    own = os.getpid()
    while True:
        try:
            request = read_frame(request_fd)
        except EOFError:
            return
        verdict = _run(request, reply_fd)
        if os.getpid() != own:
            os._exit(0)  # a fork of the verifier that came back
        write_frame(reply_fd, {"verdict": dataclasses.asdict(verdict), "children": _has_children()})


def _die_with_owner(lifeline_fd: int) -> None:
    """SIGKILL from the kernel to this process group when the owner's end of the pipe closes.

    A thread that waits for it would not do: a regular expression that backtracks without end holds the GIL.
    """
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)
    watch = select.poll()
    watch.register(lifeline_fd, select.POLLIN)
    if watch.poll(0):
        sys.exit("the owner is gone already")


def _run(request: dict[str, Any], reply_fd: int) -> Verdict:
    name, options = request["name"], request["options"]
    try:
        load_verifier(name)
    except Exception as error:  # reported as the verdict: a worker has no other way to report it
        write_frame(reply_fd, {"started": True})
        return Verdict("error", None, {"reason": f"{error}"})
    write_frame(reply_fd, {"started": True})
    _limit_memory(request["memory_mb"])
    verdict = verify(name, request["response"], request["record"], options)
    _limit_memory(None)
    if len(str(verdict.detail)) > MAX_DETAIL:
        return dataclasses.replace(verdict, detail={"reason": f"detail over {MAX_DETAIL} characters left out"})
    return verdict


def _limit_memory(added_mb: int | None) -> None:
    limit = resource.RLIM_INFINITY
    if added_mb is not None:
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        limit = pages * resource.getpagesize() + (added_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _has_children() -> bool:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
