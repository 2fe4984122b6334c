"""The child process that runs vLLM: `python -m oapl_engine.inference.engine_process OPTIONS`, OPTIONS as JSON.

It serves one owner over the connected unix socket that it inherits: see protocol.py for frames and EngineClient for the
calls. It ends when the socket or the owner does, its own children included.
"""

import asyncio
import ctypes
import logging
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from oapl_engine.errors import RunError
from oapl_engine.inference import protocol
from oapl_engine.inference.options import ProcessOptions
from oapl_engine.inference.protocol import Reply, Request
from oapl_engine.inference.server import EngineServer
from oapl_engine.inference.vllm_settings import start_llm

logger = logging.getLogger("oapl_engine.inference")

PR_SET_PDEATHSIG = 1
WATCH_SECONDS = 0.25


def end(code: int, folder: str) -> None:
    """Leave immediately: end our children (their resource tracker cleans up shared memory), remove our traces."""
    children = psutil.Process().children(recursive=True)
    children = [c for c in children if "resource_tracker" not in " ".join(c.cmdline())]
    for child in children:
        child.kill()
    psutil.wait_procs(children, 2)
    remove_traces(folder)
    os._exit(code)


def remove_traces(folder: str) -> None:
    """Our temporary folder, and shared memory of tensor parallel ranks, which vLLM names after a file in there."""
    for store in Path(folder).glob("vllm_dist_*"):
        for segment in Path("/dev/shm").glob(f"{store.name}-*"):
            segment.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def leave_folder(folder: str) -> None:
    """Temporary files go where the owner's go from now on: compilers need a place whenever a kernel is first used. Our
    folder is removed while we can: a process that is killed removes nothing."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(Path(folder).parent)
    remove_traces(folder)


def watch_owner(owner: int, folder: str) -> None:
    """End with the owner: its death shows as another parent, whichever process may still hold its end of the socket."""

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(WATCH_SECONDS)
        end(0, folder)

    threading.Thread(target=watch, name="watch-owner", daemon=True).start()


def check_peer(connection: socket.socket) -> None:
    """The other end must belong to our user."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid != os.getuid():
        raise PermissionError(f"the socket's peer runs as user {uid}, this engine serves only user {os.getuid()}")


async def serve(server: EngineServer, connection: socket.socket) -> None:
    """Answer requests until the owner closes the socket or the engine dies."""
    reader, writer = await asyncio.open_connection(sock=connection)
    tasks: set[asyncio.Task[None]] = set()

    def send(reply: Reply) -> None:
        writer.write(protocol.pack(reply))

    send(Reply(0, "result", await server.counters()))
    health = asyncio.create_task(_die_with_engine(server.llm))
    while (frame := await protocol.read_frame(reader)) is not None:
        task = asyncio.create_task(server.answer(msgspec.msgpack.decode(frame, type=Request), send))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    health.cancel()


async def _die_with_engine(llm: Any) -> None:
    while not llm.errored:
        await asyncio.sleep(WATCH_SECONDS)
    logger.error("vLLM's engine is dead; this process ends with it")
    os.kill(os.getpid(), signal.SIGKILL)


async def run(options: ProcessOptions) -> None:
    """Start vLLM, then serve until the owner closes the socket."""
    connection = socket.socket(fileno=options.socket)
    connection.set_inheritable(False)
    check_peer(connection)
    llm, on_cpu = await start_llm(options.engine)
    if options.engine.tensor_parallel == 1:
        leave_folder(options.folder)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # covers a process that is stopped or stuck
    await serve(EngineServer(llm, options.engine, on_cpu), connection)


def main() -> None:
    options = msgspec.json.decode(sys.argv[1], type=ProcessOptions)
    watch_owner(options.owner, options.folder)
    if options.engine.cores:
        os.sched_setaffinity(0, options.engine.cores)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    code = 1
    try:
        asyncio.run(run(options))
        code = 0
    except RunError as error:
        logger.error("%s", error)
    except BaseException:
        logger.exception("the engine process failed")
    finally:
        sys.stderr.flush()
        end(code, options.folder)


if __name__ == "__main__":
    main()
