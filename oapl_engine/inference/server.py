"""EngineServer: carries out the requests of the owner on a running vLLM.

A gate of its own stands before vLLM: while it is closed, generate waits, so that probe prompts can be scored before a
version serves.
"""

import asyncio
import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.protocol import Reply, Request, Sample, Sampling
from oapl_engine.inference.weight_updates import WeightState, WeightUpdates

logger = logging.getLogger("oapl_engine.inference")

# What vLLM does with its requests. "keep": our own gate holds the samples, and continues them after resume.
PAUSE_MODES = {"drain": "wait", "abort": "abort", "keep": "abort"}


@dataclasses.dataclass
class Counters:
    """Of one incarnation.

    tokens_generated:      response tokens of samples that ended, aborted ones included
    prompt_tokens_cached:  prompt tokens that were read from the prefix cache
    samples_running:       requests that vLLM is computing
    """

    incarnation: int
    tokens_generated: int = 0
    prompt_tokens_cached: int = 0
    samples_running: int = 0


class EngineServer:
    """One owner's engine.

    llm:     vLLM's AsyncLLM, or what a test puts in its place
    on_cpu:  there is no memory to give back
    """

    def __init__(self, llm: Any, options: EngineOptions, on_cpu: bool) -> None:
        self.llm = llm
        self.on_cpu = on_cpu
        self.counted = Counters(options.incarnation)
        self.weights = WeightState(options.version, options.version)
        self.updates = WeightUpdates(llm, self.weights, self._check_still)
        self.keep = False
        self.asleep: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.idle = asyncio.Event()
        self.idle.set()
        self._names = 0
        self.methods: dict[str, Callable[..., Any]] = {
            "generate": self.generate,
            "score": self.score,
            "pause": self.pause,
            "resume": self.resume,
            "sleep": self.sleep,
            "wake": self.wake,
            "update": self.updates.answer,
            "counters": self.counters,
        }

    async def answer(self, request: Request, send: Callable[[Reply], None]) -> None:
        """Carry out one request; every request ends in exactly one "result" or "refused"."""
        try:
            if request.method not in self.methods:
                raise ValueError(f"unknown method {request.method}; there are: {', '.join(self.methods)}")
            if request.method == "generate":
                body = None
                await self.generate(**request.arguments, send=lambda s: send(Reply(request.id, "sample", s)))
            else:
                body = await self.methods[request.method](**request.arguments)
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
        await asyncio.gather(*(self._sample(token_ids, index, how, send) for index in range(n)))

    async def score(self, token_ids: list[int]) -> bytes:
        """f32 log-probs of token_ids[1:], each given those before it, at temperature 1."""
        from vllm import SamplingParams

        self.weights.refuse_unless("complete", "unattested")
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True)
        output = await self._complete(token_ids, params)
        rows = output.prompt_logprobs
        scores = np.asarray([rows.logprobs[i] for i in rows.start_indices[1:]], "<f4")
        return scores.tobytes()

    async def pause(self, mode: str) -> None:
        """drain: finish what runs; abort: end it with finish "abort"; keep: continue with it after resume."""
        if mode not in PAUSE_MODES:
            raise ValueError(f"pause mode {mode!r}: one of {', '.join(PAUSE_MODES)}")
        self.keep = mode == "keep"
        self.gate.clear()
        if self.counted.samples_running:
            await self.llm.pause_generation(mode=PAUSE_MODES[mode], clear_cache=True)
            await self.llm.resume_generation()  # the gate is closed: only score gets through
            await self.idle.wait()  # vLLM has finished what ran, but its last outputs may not have reached us yet
        else:
            await self.llm.reset_prefix_cache()

    async def resume(self) -> None:
        """Open the gate. Refused unless the weights are those of one complete, attested version."""
        self.weights.refuse_unless("complete")
        self.gate.set()

    async def sleep(self, tags: list[str]) -> None:
        """Give device memory back. Weights are discarded (a publish must follow). Does nothing on CPU, or asleep."""
        if self.on_cpu or self.asleep == {"weights", "kv_cache"}:
            return
        self.gate.clear()
        await self.llm.sleep(level=2 if "weights" in tags else 1)
        self.asleep = {"weights", "kv_cache"}
        if "weights" in tags:
            self.weights.state = "incomplete"

    async def wake(self, tags: list[str]) -> None:
        """Take device memory again, where it was given back; the gate stays closed until resume."""
        tags = [tag for tag in tags or sorted(self.asleep) if tag in self.asleep]
        if tags:  # vLLM would map twice what is awake
            await self.llm.wake_up(tags)
            self.asleep -= set(tags)

    async def counters(self) -> dict[str, Any]:
        """What this incarnation has done, and the version and state of its weights."""
        weights = {"version": self.weights.version, "state": self.weights.state}
        return {**dataclasses.asdict(self.counted), **weights, "pid": os.getpid()}

    def _check_still(self) -> None:
        if self.gate.is_set():
            raise RuntimeError("weights can change only while generation is paused: call pause first")
        if "weights" in self.asleep:
            raise RuntimeError("the weights' memory was given back: call wake first")
        if self.counted.samples_running:
            raise RuntimeError(f"{self.counted.samples_running} requests are still being computed")

    async def _sample(self, prompt: list[int], index: int, how: Sampling, send: Callable[[Sample], None]) -> None:
        tokens: list[int] = []
        logprobs: list[float] = []
        spans: list[tuple[int, int, int]] = []
        while True:
            while not self.gate.is_set():  # it may close again before we run
                await self.gate.wait()
            output = await self._complete(prompt + tokens, _sampling_params(how, len(tokens)))
            part, start = output.outputs[0], len(tokens)
            tokens += part.token_ids
            logprobs += part.logprobs.logprobs
            for span in part.weight_versions or []:
                extend_spans(spans, int(span.version), span.start + start, span.end + start)
            self.counted.prompt_tokens_cached += output.num_cached_tokens or 0
            if part.finish_reason != "abort" or not self.keep:
                break
        self.counted.tokens_generated += len(tokens)
        ids, behavior = np.asarray(tokens, "<i4").tobytes(), np.asarray(logprobs, "<f4").tobytes()
        send(Sample(index, ids, behavior, part.finish_reason, tuple(spans)))

    async def _complete(self, token_ids: list[int], params: Any) -> Any:
        await self.wake(["kv_cache"])  # a version is attested before the scheduler wakes the cache
        self._names += 1
        output = None
        self.counted.samples_running += 1
        self.idle.clear()
        try:
            prompt = {"type": "token", "prompt_token_ids": token_ids}
            async for latest in self.llm.generate(prompt, params, str(self._names)):
                output = latest
        finally:
            self.counted.samples_running -= 1
            if not self.counted.samples_running:
                self.idle.set()
        return output


def extend_spans(spans: list[tuple[int, int, int]], version: int, start: int, end: int) -> None:
    """Add [start, end) of a version, joined to the last span where the version is the same."""
    if spans and spans[-1][0] == version and spans[-1][2] == start:
        start = spans.pop()[1]
    spans.append((version, start, end))


def _sampling_params(how: Sampling, done: int) -> Any:
    """vLLM's parameters for a sample of which `done` tokens are there already."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=how.temperature,
        top_p=how.top_p,
        top_k=how.top_k,
        max_tokens=how.max_new_tokens - done,
        stop_token_ids=[] if how.ignore_stops else list(how.stop_token_ids),
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
