"""Collector: prompts in, verified groups out. Its event loop runs on a thread of its own, so training never waits."""

import asyncio
import dataclasses
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from oapl_engine.inference.client import EngineClient, EngineLost
from oapl_engine.inference.protocol import Sample, Sampling
from oapl_engine.samples import Group, Prompt, Rollout, Span, make_rollout

T = TypeVar("T")


Verify = Callable[[Prompt, NDArray[np.int32]], Awaitable[Any]]  # a rewards.Verdict


class Collector:
    """Generates groups on one engine and has each sample verified as soon as it is finished.

    verify(prompt, response_token_ids [R] i32) runs in the collector's loop; on_group(group) is called on its thread and
    must be thread-safe and quick. What goes wrong in either goes to on_failure(error), on that thread too, and is
    raised by the next submit, call or close. Who submits no groups needs neither.
    Sample by sample: aborted samples get status "aborted", those of an engine that died "lost", neither is verified.
    """

    def __init__(
        self,
        client: EngineClient,
        verify: Verify | None = None,
        on_group: Callable[[Group], None] | None = None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.client = client
        self._verify: Any = verify
        self._on_group: Any = on_group
        self._on_failure = on_failure
        self._failure: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)
        self._thread.start()

    def attach(self, client: EngineClient) -> None:
        """Use this client from now on: after Engine.restart()."""
        self.client = client

    def submit(self, prompt: Prompt, group_id: str, group_size: int, sampling: Sampling) -> None:
        """Generate group_size rollouts of a prompt; returns at once, the group arrives at on_group."""
        self._raise_failure()
        self.loop.call_soon_threadsafe(self._start, prompt, group_id, group_size, sampling)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the client (pause, resume, transfer, score, …) in the loop; returns what it returns."""
        self._raise_failure(coroutine)
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def generate_many(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[list[Sample]]:
        """n samples of every prompt, in order of prompt and sample index. For evaluation. Raises EngineLost."""

        async def of(prompt: Prompt) -> list[Sample]:
            samples = [s async for s in self.client.generate(prompt.token_ids, n, sampling)]
            return sorted(samples, key=lambda s: s.index)

        async def of_all() -> list[list[Sample]]:
            return await asyncio.gather(*map(of, prompts))

        return self.call(of_all())

    def close(self) -> None:
        """Drop what is in flight and end the thread."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
        self._raise_failure()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        pending = asyncio.all_tasks(self.loop)
        for task in pending:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self.loop.close()

    def _start(self, *arguments: Any) -> None:
        task = self.loop.create_task(self._group(*arguments))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error:
            self._failure = error
            self._on_failure(error)

    def _raise_failure(self, unused: Coroutine[Any, Any, Any] | None = None) -> None:
        failure, self._failure = self._failure, None
        if failure:
            if unused:
                unused.close()
            raise failure

    async def _group(self, prompt: Prompt, group_id: str, group_size: int, sampling: Sampling) -> None:
        begin = time.time_ns()
        nothing: dict[str, Any] = {"finish": "abort", "spans": (), "started_ns": begin, "finished_ns": begin}
        finishing: dict[int, asyncio.Task[Rollout]] = {}
        try:
            async for sample in self.client.generate(prompt.token_ids, group_size, sampling):
                finished = self._finish(prompt, group_id, sample, begin)
                finishing[sample.index] = asyncio.create_task(finished)
        except EngineLost:
            pass  # samples that did not arrive are "lost"; the supervisor reports the engine
        rollouts = [
            await finishing[i] if i in finishing else make_rollout(prompt, group_id, i, [], status="lost", **nothing)
            for i in range(group_size)
        ]
        versions = [s.version for r in rollouts for s in r.spans]
        self._on_group(Group(group_id, prompt, tuple(rollouts), min(versions, default=-1)))

    async def _finish(self, prompt: Prompt, group_id: str, sample: Sample, begin: int) -> Rollout:
        rollout = make_rollout(
            prompt,
            group_id,
            sample.index,
            sample.ids(),
            np.frombuffer(sample.logprobs, "<f4"),
            spans=tuple(Span(*s) for s in sample.spans),
            finish=sample.finish,
            status="aborted",
            started_ns=begin,
            finished_ns=time.time_ns(),
        )
        if sample.finish == "abort":
            return rollout
        verdict = await self._verify(prompt, rollout.response_ids)
        reward, detail = verdict.reward, verdict.detail
        if verdict.status == "scored" and (reward is None or not math.isfinite(reward)):
            detail = {**detail, "error": f"reward {reward} is not a finite number"}
        elif verdict.status == "scored":
            return dataclasses.replace(rollout, status="scored", reward=float(reward), reward_detail=detail)
        return dataclasses.replace(rollout, status="invalid", reward_detail=detail)
