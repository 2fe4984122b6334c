"""Collector: prompts in, verified groups out. Its event loop runs on a thread of its own, so training never waits."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from oapl_engine.inference.client import EngineClient, EngineLostError
from oapl_engine.inference.protocol import Sample, Sampling
from oapl_engine.rewards import Verdict
from oapl_engine.samples import Group, Prompt, Rollout, Span, Status, make_rollout

T = TypeVar("T")
Verify = Callable[[Prompt, NDArray[np.int32]], Awaitable[Verdict]]
OnGroup = Callable[[Group], None]


class Collector:
    """Generates groups on one engine and has each sample verified as soon as it is finished.

    client:      of the engine; `attach` replaces it after a restart
    verify:      coroutine function (prompt, response token ids [R] i32) -> Verdict, run in the collector's loop
    on_failure:  called with what `verify` or a group's callback raised, on the collector's thread; the next submit,
                 call or close raises it too

    Status of a rollout, sample by sample: "aborted" where generation was ended early, "lost" where the engine died
    before the sample was finished (neither is verified), else the verdict's.
    """

    def __init__(
        self,
        client: EngineClient,
        verify: Verify | None = None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.client = client
        self._verify: Any = verify
        self._on_failure = on_failure
        self._failure: BaseException | None = None
        self._open_groups = 0
        self._group_ended = threading.Condition()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)
        self._thread.start()

    def attach(self, client: EngineClient) -> None:
        """Use this client from now on: after Engine.restart()."""
        self.client = client

    def submit(self, prompt: Prompt, group_id: str, group_size: int, sampling: Sampling, on_group: OnGroup) -> None:
        """Generate group_size rollouts of a prompt; returns immediately.

        on_group(group) is called on the collector's thread when all rollouts have a status; it must be quick.
        """
        self._raise_failure()
        with self._group_ended:
            self._open_groups += 1
        self.loop.call_soon_threadsafe(self._start, prompt, group_id, group_size, sampling, on_group)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the client (pause, resume, update, score, …) in the loop; returns what it returns."""
        try:
            self._raise_failure()
        except BaseException:
            coroutine.close()
            raise
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def generate_many(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[list[Sample]]:
        """n samples of every prompt, in order of prompt and sample index, unverified. Raises EngineLostError."""
        return self.call(self._generate_all(prompts, n, sampling))

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait until every submitted group has ended, at most `seconds`; whether it was so."""
        with self._group_ended:
            return self._group_ended.wait_for(lambda: not self._open_groups, seconds)

    def close(self) -> None:
        """Drop what is in flight and end the thread."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
        self._raise_failure()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        _end_tasks(self.loop)
        self.loop.close()

    def _start(self, *arguments: Any) -> None:
        task = self.loop.create_task(self._group(*arguments))
        task.add_done_callback(self._end_group)

    def _end_group(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error:
            self._failure = error
            self._on_failure(error)
        with self._group_ended:
            self._open_groups -= 1
            self._group_ended.notify_all()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    async def _generate_all(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[list[Sample]]:
        return await asyncio.gather(*(self._generate(prompt, n, sampling) for prompt in prompts))

    async def _generate(self, prompt: Prompt, n: int, sampling: Sampling) -> list[Sample]:
        samples = [sample async for sample in self.client.generate(prompt.token_ids, n, sampling)]
        return sorted(samples, key=lambda sample: sample.index)

    async def _group(
        self, prompt: Prompt, group_id: str, group_size: int, sampling: Sampling, on_group: OnGroup
    ) -> None:
        finishing: dict[int, asyncio.Task[Rollout]] = {}
        try:
            async for sample in self.client.generate(prompt.token_ids, group_size, sampling):
                finishing[sample.index] = task = asyncio.create_task(self._finish(prompt, group_id, sample))
                task.add_done_callback(_take_exception)
        except EngineLostError:
            pass  # samples that did not arrive are "lost"; the engine's watcher reports its death
        rollouts = []
        for index in range(group_size):
            if index in finishing:
                rollouts.append(await finishing[index])
            else:
                rollouts.append(
                    make_rollout(
                        prompt,
                        group_id,
                        index,
                        [],
                        spans=(),
                        finish="abort",
                        status="lost",
                        finished_ns=time.time_ns(),
                    )
                )
        versions = [span.version for rollout in rollouts for span in rollout.spans]
        on_group(Group(group_id, prompt, tuple(rollouts), min(versions, default=-1)))

    async def _finish(self, prompt: Prompt, group_id: str, sample: Sample) -> Rollout:
        rollout = make_rollout(
            prompt,
            group_id,
            sample.index,
            sample.ids(),
            np.frombuffer(sample.logprobs, "<f4"),
            spans=tuple(Span(*span) for span in sample.spans),
            finish=sample.finish,
            status="aborted",
            finished_ns=time.time_ns(),
        )
        if sample.finish == "abort":
            return rollout
        verdict = await self._verify(prompt, rollout.response_ids)
        status: Status = "scored" if verdict.status == "scored" else "invalid"
        return replace(rollout, status=status, reward=verdict.reward, reward_detail=verdict.detail)


def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what a stopped loop still has to do, so that asyncio has nothing to print when it is closed."""
    while True:
        loop.run_until_complete(asyncio.sleep(0))  # starts the tasks that close generators of ended tasks
        pending = asyncio.all_tasks(loop)
        if not pending:
            break
        for task in pending:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())


def _take_exception(task: asyncio.Task[Rollout]) -> None:
    """asyncio prints the exception of a task that nobody asked for: a group that is dropped does not ask."""
    if not task.cancelled():
        task.exception()
