"""Publishes into one live vLLM engine: complete, exact, in place, and refused where they are not."""

import copy
import threading
import time

import msgspec
import numpy as np
import pytest
import torch

from oapl_engine.inference.client import EngineRefusedError
from oapl_engine.inference.protocol import Sampling
from oapl_engine.samples import Prompt
from oapl_engine.weights.attest import WeightMismatchError
from oapl_engine.weights.control import Start

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def rig(make_rig):
    return make_rig()


@pytest.fixture(autouse=True)
def whole(rig):
    """Each test begins with a served version and no fault."""
    rig.control.let_go()
    rig.fault.unlink(missing_ok=True)
    yield
    rig.control.let_go()
    rig.mode = "drain"
    rig.fault.write_text("live head")
    rig.change()
    rig.publisher.engine_restarted()
    rig.publish()
    rig.fault.unlink()


def test_ten_publishes_by_one_process_are_token_exact(rig):
    """Ten publishes by one process each token exact with the trainer."""
    pid = rig.engine.pid
    for _ in range(10):
        rig.change()
        report = rig.publish()
        assert rig.counters()["version"] == rig.version
        assert rig.greedy_of_engine() == rig.greedy_of_trainer()
        assert report.gap.mean <= 2e-5
        assert report.gap.max <= 5e-4
        assert report.changed_share > 0.9
    counters = rig.counters()
    assert (rig.engine.pid, counters["pid"], counters["incarnation"]) == (pid, pid, 0)


def test_greedy_output_changes_with_the_version(rig):
    """The claim above could not fail otherwise."""
    before = rig.greedy_of_engine()
    rig.change(0.5)
    rig.publish()
    assert rig.greedy_of_engine() != before


def test_sampled_logprobs_are_the_trainers_at_temperature(rig):
    """Sampled log-probs are those of the trainer at the temperature of sampling."""
    prompt = Prompt("p", rig.prompts[0], "test")
    rig.publish()
    for temperature in (1.0, 0.7):
        how = Sampling(temperature=temperature, max_new_tokens=40, ignore_stops=True)
        for sample in rig.collector.generate_many([prompt], 4, how)[0]:
            response = sample.ids().tolist()
            tokens = prompt.token_ids.tolist() + response
            with torch.no_grad():
                logits = rig.model(torch.tensor([tokens])).logits[0, 7:-1] / temperature
            expected = logits.log_softmax(-1)[range(40), response].numpy()
            gap = np.abs(expected - np.frombuffer(sample.logprobs, "<f4"))
            assert gap.mean() <= 2e-5
            assert gap.max() <= 5e-4
            assert sample.spans == ((rig.version, 0, 40),)


def assert_refused(rig, parameter):
    """The publish is refused, names the parameter, and the engine serves nothing: neither new prompts nor a resume."""
    rig.change()
    with pytest.raises(WeightMismatchError) as refusal:
        rig.publish()
    assert refusal.value.parameter == parameter
    assert not rig.served_within(1.0)
    with pytest.raises(EngineRefusedError, match="weights are incomplete"):
        rig.control.resume()


def test_a_flipped_bit_is_refused_and_the_next_version_serves(rig):
    """A flipped bit is refused and the next complete version serves."""
    name = "model.layers.1.self_attn.k_proj.weight"

    def flip(bucket):
        if name in bucket.checksums:
            part = next(p for p in rig.publisher.layout.slices if p.name == name)
            rig.publisher.buckets.views[part.bucket % 2][part.offset] ^= 4

    rig.control.before["bucket"] = flip
    assert_refused(rig, name)
    rig.control.let_go()
    rig.publish()
    assert rig.served_within(30.0)
    assert rig.greedy_of_engine() == rig.greedy_of_trainer()


def test_a_tensor_left_out_is_refused(rig):
    name = "model.layers.2.mlp.down_proj.weight"

    def leave_out(bucket):
        kept = {label: value for label, value in bucket.checksums.items() if label != name}
        return msgspec.structs.replace(bucket, checksums=kept)

    rig.control.before["bucket"] = leave_out
    assert_refused(rig, name)


def test_a_tied_head_that_stays_stale_is_refused(rig):
    rig.fault.write_text("stale head")
    assert_refused(rig, "lm_head.weight")


def test_values_that_do_not_reach_the_live_parameter_are_refused(rig):
    """Coverage of the compute path: the bytes arrived, were checked, and went elsewhere."""
    rig.fault.write_text("lost scatter")
    rig.change()
    with pytest.raises(WeightMismatchError, match=r"probe prompt|gate_up_proj"):
        rig.publish()
    assert not rig.served_within(1.0)


def test_an_update_cut_short_serves_nothing(rig):
    """An update that was cut short serves nothing until a complete version arrives."""
    rig.control.pause("abort")
    rig.version += 1
    rig.control.update(Start(rig.version))
    assert rig.counters()["state"] == "incomplete"
    with pytest.raises(EngineRefusedError, match="weights are incomplete"):
        rig.control.resume()
    with pytest.raises(EngineRefusedError, match="weights are incomplete"):
        rig.control.score([1, 2])
    rig.publish()
    assert rig.greedy_of_engine() == rig.greedy_of_trainer()


def test_weights_do_not_change_while_the_engine_generates(rig):
    reply = rig.control.update(Start(rig.version + 1))
    assert "call pause first" in reply.error
    assert rig.served_within(30.0)


def test_a_version_that_does_not_grow_is_refused(rig):
    rig.control.pause("abort")
    reply = rig.control.update(Start(rig.version))
    assert "versions only grow" in reply.error
    rig.control.resume()


def begin_and_see(rig, begin, finished, number):
    """A thread whose `number` samples are running; begun again where they were over before anybody looked."""
    for _ in range(50):
        finished.clear()
        thread = begin()
        while thread.is_alive():
            if rig.counters()["samples_running"] >= number:
                return thread
    raise AssertionError(f"{number} samples were never seen running")


def test_a_sample_kept_across_a_publish_has_both_spans(rig):
    """A sample that is kept across a publish carries the spans of both versions."""
    finished = []

    async def generate():
        how = Sampling(max_new_tokens=110, ignore_stops=True)
        finished.extend([s async for s in rig.engine.client.generate([5, 6, 7], 64, how)])

    rig.mode = "keep"
    old = rig.version

    def begin():
        thread = threading.Thread(target=lambda: rig.collector.call(generate()))
        thread.start()
        return thread

    rig.change()  # the trainer's weights; little time is left once the samples run
    rig.greedy_of_engine()  # what is compiled at a first request is compiled
    thread = begin_and_see(rig, begin, finished, 64)
    time.sleep(0.15)  # of about 0.6 s: some tokens of the old version
    rig.publish()
    thread.join()
    for sample in finished:
        (first, start, cut), (second, again, end) = sample.spans
        assert (first, second, start, end) == (old, rig.version, 0, 110)
        assert cut == again
        assert 0 < cut < 110
        tokens = [5, 6, 7, *sample.ids().tolist()]
        now = rig.logprobs([tokens])[0][2:]
        assert np.abs(now - np.frombuffer(sample.logprobs, "<f4"))[cut:].max() <= 5e-4


@pytest.mark.parametrize("mode", ["drain", "abort", "keep"])
def test_requests_in_flight_carry_the_version_of_each_token(rig, mode):
    """Four samples run when the publish begins, one arrives in the middle of it."""
    old, before = rig.version, copy.deepcopy(rig.model)
    running, late = [], []

    async def generate(into, prompt, n):
        how = Sampling(max_new_tokens=110, ignore_stops=True)
        into.extend([(prompt, s) async for s in rig.engine.client.generate(prompt, n, how)])

    def begin(into, prompt, n):
        thread = threading.Thread(target=lambda: rig.collector.call(generate(into, prompt, n)))
        thread.start()
        return thread

    threads = []
    rig.control.before["bucket"] = lambda _: threads.append(begin(late, [8, 9], 1)) if len(threads) == 1 else None
    rig.change()
    rig.mode = mode
    threads.append(begin_and_see(rig, lambda: begin(running, [5, 6, 7], 4), running, 4))
    rig.publish()
    for thread in threads:
        thread.join()
    assert len(running) == 4
    assert [s.spans for _, s in late] == [((rig.version, 0, 110),)]
    for prompt, sample in running + late:
        tokens = [*prompt, *sample.ids().tolist()]
        assert sample.finish == ("abort" if mode == "abort" and (prompt, sample) in running else "length")
        ends = [end for _, _, end in sample.spans]
        assert [start for _, start, _ in sample.spans] == [0, *ends[:-1]][: len(ends)]
        assert (ends or [0])[-1] == len(tokens) - len(prompt), "every token is in one span"
        for version, start, end in sample.spans:
            with torch.no_grad():
                logits = (before if version == old else rig.model)(torch.tensor([tokens])).logits[
                    0, len(prompt) - 1 : -1
                ]
            expected = logits.log_softmax(-1)[range(len(logits)), tokens[len(prompt) :]].numpy()
            gap = np.abs(expected - np.frombuffer(sample.logprobs, "<f4"))[start:end]
            assert gap.max(initial=0) <= 5e-4
    if mode == "keep":
        assert {len(s.spans) for _, s in running} == {2}
    elif mode == "drain":
        assert {s.spans for _, s in running} == {((old, 0, 110),)}
    else:
        assert all(len(s.token_ids) < 4 * 110 for _, s in running)
