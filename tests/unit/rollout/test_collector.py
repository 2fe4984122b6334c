"""Groups come out complete, each sample verified as it finishes, and what happened to a sample is in its status."""

import asyncio
import gc
import queue
import threading
import time

import numpy as np
import pytest

from oapl_engine.inference.client import EngineLostError
from oapl_engine.inference.protocol import Sample, Sampling
from oapl_engine.rewards import Verdict
from oapl_engine.rollout.collector import Collector
from oapl_engine.samples import Prompt, Span

PROMPT = Prompt("p", np.array([5, 6, 7], np.int32), "sort", {"answer": "x"})


class FakeClient:
    """Yields the given samples, in the given order; an EngineLostError in the list is raised."""

    def __init__(self, *samples):
        self.samples = samples

    async def generate(self, token_ids, n, sampling):
        for item in self.samples:
            await asyncio.sleep(0)
            if isinstance(item, Exception):
                raise item
            yield item


def sample(index, tokens=(8, 9), finish="stop", spans=((2, 0, 2),)):
    ids = np.array(tokens, "<i4")
    return Sample(index, ids.tobytes(), (-ids / 10).astype("<f4").tobytes(), finish, spans)


def verdict(status="scored", reward=1.0, **detail):
    return Verdict(status, reward, detail)


def collect(client, verify, size):
    groups = queue.Queue()
    collector = Collector(client, verify)
    try:
        collector.submit(PROMPT, "0.p.0", size, Sampling(), groups.put)
        return groups.get(timeout=10)
    finally:
        collector.close()


async def sum_of_tokens(prompt, response):
    return verdict(reward=float(response.sum()), prompt=prompt.id)


def test_a_group_holds_every_sample_in_order_with_its_arrays():
    group = collect(FakeClient(sample(1, (3, 4, 1)), sample(0)), sum_of_tokens, 2)
    assert group.id == "0.p.0"
    assert group.version == 2
    assert [r.key for r in group.rollouts] == ["0.p.0.0", "0.p.0.1"]
    first = group.rollouts[0]
    assert first.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert first.token_ids.dtype == np.int32
    assert first.loss_mask.tolist() == [0, 0, 0, 1, 1]
    assert first.loss_mask.dtype == np.uint8
    assert first.behavior_logprob.tolist() == pytest.approx([0, 0, 0, -0.8, -0.9])
    assert first.behavior_logprob.dtype == np.float32
    assert first.response_ids.tolist() == [8, 9]
    assert first.spans == (Span(2, 0, 2),)
    assert (first.status, first.reward, first.finish, first.task) == ("scored", 17.0, "stop", "sort")
    assert first.reward_detail == {"prompt": "p"}
    assert first.finished_ns > 0


def test_a_groups_version_is_the_oldest_that_sampled_a_token():
    samples = (sample(0, spans=((5, 0, 1), (6, 1, 2))), sample(1, spans=((6, 0, 2),)))
    assert collect(FakeClient(*samples), sum_of_tokens, 2).version == 5


def test_a_sample_is_verified_while_others_still_run():
    """The second sample is not finished before the verdict on the first is in."""
    verified = asyncio.Event()

    class Waiting(FakeClient):
        async def generate(self, token_ids, n, sampling):
            yield sample(0)
            await asyncio.wait_for(verified.wait(), 5)
            yield sample(1)

    async def verify(prompt, response):
        verified.set()
        return verdict()

    assert [r.status for r in collect(Waiting(), verify, 2).rollouts] == ["scored", "scored"]


def test_aborted_samples_are_not_verified():
    async def verify(prompt, response):
        raise AssertionError("an aborted sample was verified")

    group = collect(FakeClient(sample(0, finish="abort")), verify, 1)
    assert (group.rollouts[0].status, group.rollouts[0].reward) == ("aborted", None)
    assert group.rollouts[0].response_tokens == 2


def test_a_dying_engine_marks_what_did_not_arrive_as_lost():
    """An engine that dies leaves what arrived and marks the rest lost."""
    group = collect(FakeClient(sample(1), EngineLostError("killed")), sum_of_tokens, 3)
    assert [r.status for r in group.rollouts] == ["lost", "scored", "lost"]
    assert group.rollouts[0].response_tokens == 0
    assert group.version == 2


@pytest.mark.parametrize(
    "answer",
    [
        verdict("invalid", None, reason="time"),
        verdict("error", None, reason="time"),
    ],
)
def test_invalid_verdict_says_why(answer):
    async def verify(prompt, response):
        return answer

    rollout = collect(FakeClient(sample(0)), verify, 1).rollouts[0]
    assert (rollout.status, rollout.reward) == ("invalid", None)
    assert rollout.reward_detail["reason"] == "time"


def test_a_verifier_that_raises_is_reported_and_raised_again():
    failures = queue.Queue()

    async def verify(prompt, response):
        raise ZeroDivisionError("verifier")

    collector = Collector(FakeClient(sample(0)), verify, failures.put)
    collector.submit(PROMPT, "0.p.0", 1, Sampling(), lambda group: None)
    assert isinstance(failures.get(timeout=10), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        collector.close()


def test_generate_many_keeps_the_order_of_prompts_and_samples():
    class Echo:
        async def generate(self, token_ids, n, sampling):
            for i in reversed(range(n)):
                await asyncio.sleep(0.001 * int(token_ids[0]))
                yield sample(i, (int(token_ids[0]), i))

    prompts = [Prompt(str(i), np.array([9 - i], np.int32), "t") for i in range(4)]
    collector = Collector(Echo())
    found = collector.generate_many(prompts, 3, Sampling())
    collector.close()
    expected = [[[9 - p, i] for i in range(3)] for p in range(4)]
    assert [[np.frombuffer(s.token_ids, "<i4").tolist() for s in samples] for samples in found] == expected


def test_collector_waits_until_no_group_is_open():
    """wait_until_idle returns once on_group of the last group has been called; False after its time."""
    release = threading.Event()

    async def verify(prompt, response):
        await asyncio.to_thread(release.wait)
        return verdict()

    collector = Collector(FakeClient(sample(0)), verify)
    groups = []
    collector.submit(PROMPT, "0.p.0", 1, Sampling(), groups.append)
    assert not collector.wait_until_idle(0.05)
    release.set()
    assert collector.wait_until_idle(10)
    assert len(groups) == 1
    collector.close()


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_closing_in_the_middle_prints_nothing(caplog):
    """A group that is dropped asks for no verdict; asyncio would print what each one raised."""
    failed = threading.Event()

    class Endless(FakeClient):
        async def generate(self, token_ids, n, sampling):
            yield sample(0)
            await asyncio.Event().wait()

    async def verify(prompt, response):
        failed.set()
        raise ZeroDivisionError("verifier")

    collector = Collector(Endless(), verify)
    collector.submit(PROMPT, "0.p.0", 2, Sampling(), lambda group: None)
    assert failed.wait(10)
    collector.close()
    gc.collect()
    assert caplog.messages == []


def test_generators_that_are_left_are_closed_with_the_loop(caplog):
    """A call that has its result leaves its generator, which asyncio closes by a task of its own."""
    closed = []

    class Slow(FakeClient):
        async def generate(self, token_ids, n, sampling):
            try:
                yield sample(0)
                await asyncio.Event().wait()
            finally:
                closed.append(n)
                await asyncio.sleep(0)

    client = Slow()

    async def first():
        async for found in client.generate([1], 1, Sampling()):
            return found

    async def leave_one():
        await first()
        collector.loop.stop()

    collector = Collector(client)
    asyncio.run_coroutine_threadsafe(leave_one(), collector.loop)
    wait_until(lambda: not collector._thread.is_alive())
    collector.close()
    gc.collect()
    assert closed == [1]
    assert caplog.messages == []
