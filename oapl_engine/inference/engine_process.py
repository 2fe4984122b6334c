"""The child process that runs vLLM: `python -m oapl_engine.inference.engine_process OPTIONS`, OPTIONS a JSON object.

It serves one owner over the connected unix socket that it inherits (options["socket"]): see protocol.py for frames and
EngineClient for the calls. It ends when the socket or the owner does, its own children included. A gate of its own
stands before vLLM: while it is closed, generate waits, so that golden prompts can be scored before a version serves.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

from oapl_engine.inference import protocol
from oapl_engine.inference.protocol import Reply, Request, Sample, Sampling

logger = logging.getLogger("oapl_engine.inference")

PR_SET_PDEATHSIG = 1
WATCH_SECONDS = 0.25
CPU_BLOCK_SIZE = 32  # tokens a KV block: small blocks let short prompts be shared between samples
PAUSE_MODES = {"drain": "wait", "abort": "abort", "keep": "abort"}
SEED_STRIDE = 1_000_003


@dataclasses.dataclass
class Counters:
    """Of this incarnation. tokens_generated: response tokens of samples that ended, aborted ones included."""

    incarnation: int
    tokens_generated: int = 0
    tokens_scored: int = 0
    samples_finished: int = 0
    samples_running: int = 0


class EngineServer:
    """Carries out requests. state: complete → incomplete (transfer began) → unattested (finished) → complete."""

    def __init__(self, llm: Any, stop_token_ids: tuple[int, ...], options: dict[str, Any]) -> None:
        self.llm = llm
        self.stop_token_ids = stop_token_ids
        self.version: int = options["version"]
        self.arriving = self.version
        self.on_cpu: bool = options["on_cpu"]
        self.counters = Counters(options["incarnation"])
        self.state = "complete"
        self.keep = False
        self.asleep: set[str] = set()
        self.refused: dict[str, str] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.idle = asyncio.Event()
        self.idle.set()
        self._names = 0

    async def answer(self, request: Request, send: Callable[[Reply], None]) -> None:
        """Carry out one request; every request ends in exactly one "result" or "refused"."""
        method = METHODS.get(request.method)
        try:
            if method is None:
                raise ValueError(f"unknown method {request.method}; there are: {', '.join(METHODS)}")
            stream = {"send": lambda s: send(Reply(request.id, "sample", s))} if request.method == "generate" else {}
            body = await method(self, **request.arguments, **stream)
        except Exception as error:
            logger.exception("request %s was refused", request.method)
            send(Reply(request.id, "refused", f"{type(error).__name__}: {error}"))
            return
        send(Reply(request.id, "result", body))

    async def generate(
        self, token_ids: list[int], n: int, sampling: dict[str, Any], send: Callable[[Sample], None]
    ) -> None:
        """n single requests: each ends on its own, and the prefix cache computes the prompt's full blocks once."""
        how = msgspec.convert(sampling, Sampling)
        await asyncio.gather(*(self._sample(token_ids, i, how, send) for i in range(n)))

    async def _sample(self, prompt: list[int], index: int, how: Sampling, send: Callable[[Sample], None]) -> None:
        tokens: list[int] = []
        logprobs: list[float] = []
        spans: list[tuple[int, int, int]] = []
        while True:
            while not self.gate.is_set():  # it may close again before we run
                await self.gate.wait()
            output = await self._complete(prompt + tokens, self._params(how, index, len(tokens)))
            part, start = output.outputs[0], len(tokens)
            tokens += part.token_ids
            logprobs += part.logprobs.logprobs
            for span in part.weight_versions or []:
                extend_spans(spans, int(span.version), span.start + start, span.end + start)
            if part.finish_reason != "abort" or not self.keep:
                break
        self.counters.tokens_generated += len(tokens)
        self.counters.samples_finished += 1
        ids, behavior = np.asarray(tokens, "<i4").tobytes(), np.asarray(logprobs, "<f4").tobytes()
        send(Sample(index, ids, behavior, part.finish_reason, tuple(spans), output.num_cached_tokens or 0))

    def _params(self, how: Sampling, index: int, done: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            max_tokens=how.max_new_tokens - done,
            stop_token_ids=[] if how.ignore_stops else list(how.stop_token_ids or self.stop_token_ids),
            ignore_eos=True,
            seed=None if how.seed is None else how.seed + index + SEED_STRIDE * done,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _complete(self, token_ids: list[int], params: Any) -> Any:
        await self.wake(["kv_cache"])  # a version is attested before the scheduler wakes the cache
        self._names += 1
        output = None
        self.counters.samples_running += 1
        self.idle.clear()
        try:
            prompt = {"type": "token", "prompt_token_ids": token_ids}
            async for latest in self.llm.generate(prompt, params, str(self._names)):
                output = latest
        finally:
            self.counters.samples_running -= 1
            if not self.counters.samples_running:
                self.idle.set()
        return output

    async def score(self, token_ids: list[int]) -> bytes:
        """f32 log-probs of token_ids[1:], each given those before it, at temperature 1."""
        from vllm import SamplingParams

        self._refuse_unless("complete", "unattested")
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True)
        output = await self._complete(token_ids, params)
        self.counters.tokens_scored += len(token_ids)
        rows = output.prompt_logprobs
        scores = np.asarray([rows.logprobs[i] for i in rows.start_indices[1:]], "<f4")
        return scores.tobytes()

    def _refuse_unless(self, *states: str) -> None:
        if self.state not in states:
            raise RuntimeError(f"weights are {self.state} (version {self.arriving}): publish a complete version first")

    async def pause(self, mode: str) -> None:
        """drain: finish what runs; abort: end it with finish "abort"; keep: go on with it after resume."""
        if mode not in PAUSE_MODES:
            raise ValueError(f"pause mode {mode!r}: one of {', '.join(PAUSE_MODES)}")
        self.keep = mode == "keep"
        self.gate.clear()
        if self.counters.samples_running:
            await self.llm.pause_generation(mode=PAUSE_MODES[mode], clear_cache=True)
            await self.llm.resume_generation()  # the gate is closed: only score gets through
            await self.idle.wait()  # vLLM has finished what ran, but its last outputs may not have reached us yet
        else:
            await self.llm.reset_prefix_cache()

    async def resume(self) -> None:
        """Open the gate. Refused unless the weights are those of one complete, attested version."""
        self._refuse_unless("complete")
        self.gate.set()

    async def sleep(self, tags: list[str]) -> None:
        """Give device memory back. Weights are discarded (a publish must follow). Does nothing on CPU."""
        if self.on_cpu:
            return
        self.gate.clear()
        await self.llm.sleep(level=2 if "weights" in tags else 1)
        self.asleep = {"weights", "kv_cache"}
        if "weights" in tags:
            self.state = "incomplete"

    async def wake(self, tags: list[str]) -> None:
        """Take device memory again, where it was given back; the gate stays closed until resume."""
        tags = [tag for tag in tags or sorted(self.asleep) if tag in self.asleep]
        if tags:  # vLLM would map twice what is awake
            await self.llm.wake_up(tags)
            self.asleep -= set(tags)

    async def transfer(self, phase: str, payload: dict[str, Any]) -> dict[str, Any]:
        """One phase of a weight update. Returns {"state", "version", "error": None | str, "refused", "reports": one a
        rank, after an error and at the end}; "inspect" changes nothing, its reports are checksums of the parameters."""
        error, self.refused = None, {}
        try:
            if phase != "inspect":
                await PHASES[phase](self, payload)
        except Exception as refusal:
            logger.exception("transfer %s was refused", phase)
            error = str(refusal)
        method = "parameter_checksums" if phase == "inspect" else "weight_report"
        asked = error or phase in ("finish", "inspect")
        reports = await self.llm.collective_rpc(method) if asked else []
        return {
            "state": self.state,
            "version": self.version,
            "error": error,
            "refused": self.refused,
            "reports": reports,
        }

    async def _init(self, payload: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=payload))

    async def _start(self, payload: dict[str, Any]) -> None:
        if self.gate.is_set():
            raise RuntimeError("weights can change only while generation is paused: call pause first")
        if "weights" in self.asleep:
            raise RuntimeError("the weights' memory was given back: call wake first")
        if payload["version"] <= self.arriving:
            raise ValueError(f"version {payload['version']} after {self.arriving}: versions only grow")
        if self.counters.samples_running:
            raise RuntimeError(f"{self.counters.samples_running} requests are still being computed")
        await self.llm.reset_prefix_cache()
        await self.llm.collective_rpc("abandon_weight_update")
        self.state, self.arriving = "incomplete", payload["version"]
        await self.llm.start_weight_update()

    async def _bucket(self, payload: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.llm.update_weights(WeightTransferUpdateRequest(update_info=payload))

    async def _finish(self, payload: dict[str, Any]) -> None:
        if self.state != "incomplete":
            raise RuntimeError(f"finish without start: weights are {self.state}")
        await self.llm.finish_weight_update(str(self.arriving))
        if blocks := await self.llm.engine_core.call_utility_async("oapl_cached_blocks"):
            self.refused = {
                "parameter": "prefix cache",
                "expected": "no blocks of the version before",
                "found": f"{blocks} of them",
            }
            raise RuntimeError(f"prefix cache: {blocks} blocks of the version before are still there")
        self.state, self.version = "unattested", self.arriving

    async def _attest(self, payload: dict[str, Any]) -> None:
        if payload["accepted"] and self.state != "unattested":
            raise RuntimeError(f"nothing to attest: weights are {self.state}")
        self.state = "complete" if payload["accepted"] else "incomplete"

    async def report(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.counters), "version": self.version, "state": self.state, "pid": os.getpid()}


METHODS: dict[str, Any] = {
    "generate": EngineServer.generate,
    "score": EngineServer.score,
    "pause": EngineServer.pause,
    "resume": EngineServer.resume,
    "sleep": EngineServer.sleep,
    "wake": EngineServer.wake,
    "transfer": EngineServer.transfer,
    "counters": EngineServer.report,
}
PHASES: dict[str, Any] = {
    "init": EngineServer._init,
    "start": EngineServer._start,
    "bucket": EngineServer._bucket,
    "finish": EngineServer._finish,
    "attest": EngineServer._attest,
}


def extend_spans(spans: list[tuple[int, int, int]], version: int, start: int, end: int) -> None:
    """Add [start, end) of a version, joined to the last span where the version is the same."""
    if spans and spans[-1][0] == version and spans[-1][2] == start:
        start = spans.pop()[1]
    spans.append((version, start, end))


def set_environment(options: dict[str, Any]) -> None:
    """vLLM reads these when it is imported. Loopback only, nothing from the network, temporary files in our folder."""
    one_process = options["tensor_parallel"] == 1
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_HOST_IP="127.0.0.1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0" if one_process else "1",
        TOKENIZERS_PARALLELISM="false",
        TMPDIR=options["folder"],
        TORCHDYNAMO_DISABLE="1",  # eager; else vLLM's sampler compiles C++ at the first request (16 s)
    )
    if options["cores"]:
        os.sched_setaffinity(0, options["cores"])
    if not one_process and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        cores, ranks = sorted(os.sched_getaffinity(0)), options["tensor_parallel"]
        shares = [",".join(map(str, cores[r::ranks])) for r in range(ranks)]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(shares)


async def start_llm(options: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    """A running AsyncLLM and the token ids that end a response by default."""
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    from oapl_engine.inference.engine_core_thread import run_core_on_a_thread

    options["on_cpu"] = current_platform.is_cpu()
    if options["tensor_parallel"] == 1:
        run_core_on_a_thread()
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(options)))
    await llm.update_weight_version(str(options["version"]))
    ends = llm.model_config.try_get_generation_config().get("eos_token_id", llm.model_config.hf_config.eos_token_id)
    return llm, tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def engine_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs for our options (see supervisor.EngineOptions)."""
    on_cpu = options["on_cpu"]
    device: dict[str, Any] = {"gpu_memory_utilization": options["memory_share"], "enable_sleep_mode": True}
    if on_cpu:
        device = {"kv_cache_memory_bytes": options["kv_cache_mb"] << 20, "block_size": CPU_BLOCK_SIZE}
    transfer: dict[str, Any] = {}
    if options["weight_backend"]:
        transfer = {
            "weight_transfer_config": {"backend": options["weight_backend"]},
            "worker_extension_cls": options["worker_extension"],
        }
    return {
        "model": options["model"],
        "dtype": options["dtype"],
        "tensor_parallel_size": options["tensor_parallel"],
        "max_model_len": options["max_model_len"],
        "max_num_seqs": options["max_num_seqs"],
        "seed": options["seed"],
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "generation_config": "auto",
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        **device,
        **transfer,
    }


def end(code: int, folder: str) -> None:
    """Leave at once: end our children (their resource tracker cleans up shared memory), remove our traces."""
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


def watch_owner(owner: int, folder: str) -> None:
    """End with the owner: its death shows as another parent, whoever else may hold its end of the socket."""

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

    send(Reply(0, "result", await server.report()))
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


async def run(options: dict[str, Any]) -> None:
    connection = socket.socket(fileno=options["socket"])
    connection.set_inheritable(False)
    check_peer(connection)
    llm, stops = await start_llm(options)
    if options["tensor_parallel"] == 1:
        remove_traces(options["folder"])
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # covers a process that is stopped or stuck
    server = EngineServer(llm, stops, options)
    await serve(server, connection)


def main() -> None:
    options = json.loads(sys.argv[1])
    watch_owner(options["owner"], options["folder"])
    set_environment(options)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    code = 1
    try:
        asyncio.run(run(options))
        code = 0
    except BaseException:
        logger.exception("the engine process failed")
    finally:
        sys.stderr.flush()
        end(code, options["folder"])


if __name__ == "__main__":
    main()
