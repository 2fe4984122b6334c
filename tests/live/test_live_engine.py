"""A live engine: exact log-probs, one prefill a prompt, pauses, and a life that ends with its owner's."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from oapl_engine.inference.client import EngineLostError, EngineRefusedError
from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.protocol import Sampling
from oapl_engine.inference.supervisor import Engine, EngineStartError
from oapl_engine.rollout.collector import Collector
from oapl_engine.rollout.session import EngineSession
from oapl_engine.samples import Prompt

pytestmark = pytest.mark.live

FAULT_SECONDS = 5.0  # until nothing of a dead engine or owner is left
NOTICE_SECONDS = 2.0  # until a dead engine is noticed


def options(model, **more):
    return EngineOptions(str(model), max_model_len=128, kv_cache_mb=64, takes_updates=False, **more)


@pytest.fixture(scope="module")
def engine(micro_checkpoint, tmp_path_factory):
    with Engine(options(micro_checkpoint), tmp_path_factory.mktemp("log") / "engine.log") as engine:
        yield engine


@pytest.fixture(scope="module")
def collector(engine):
    collector = Collector(engine.client)
    yield collector
    collector.close()


def generate(collector, token_ids, n=1, **how):
    prompt = Prompt("p", np.array(token_ids, np.int32), "test")
    return collector.generate_many([prompt], n, Sampling(**how))[0]


def tokens(sample):
    return sample.ids().tolist()


def leftovers(pid):
    """Processes of the session that this one led."""
    alive = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process.pid)
    return alive


@pytest.fixture
def nothing_left():
    """A function (owner, engine pids) that waits for the end of every process, segment and folder of theirs."""
    before = set(os.listdir("/dev/shm"))

    def check(owner, *pids):
        folders = Path(tempfile.gettempdir())
        assert wait_until(lambda: not any(leftovers(pid) for pid in pids), FAULT_SECONDS)
        assert wait_until(lambda: not list(folders.glob(f"oapl-engine-{owner}-*")), FAULT_SECONDS)
        assert wait_until(lambda: set(os.listdir("/dev/shm")) <= before, FAULT_SECONDS)

    return check


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_rescoring_a_sample_gives_its_log_probs_back(engine, collector):
    for sample in generate(collector, [3, 4, 5, 6], 4, max_new_tokens=30, ignore_stops=True):
        scores = collector.call(engine.client.score([3, 4, 5, 6, *tokens(sample)]))
        assert len(scores) == 33
        assert np.abs(scores[3:] - np.frombuffer(sample.logprobs, "<f4")).max() <= 1e-5


def test_a_prompt_is_prefilled_once_for_all_samples_of_a_group(engine, collector):
    prompt = np.random.default_rng(1).integers(2, 48, 70).tolist()
    before = collector.call(engine.client.counters())["prompt_tokens_cached"]
    generate(collector, prompt, 4, max_new_tokens=2, ignore_stops=True)
    cached = collector.call(engine.client.counters())["prompt_tokens_cached"] - before
    assert cached == 3 * 64, "two full blocks of 32 tokens, for all samples but the first"


def test_a_response_ends_with_its_stop_token_which_has_a_log_prob(collector):
    samples = generate(collector, [3, 4, 5], 32, max_new_tokens=40, stop_token_ids=(7, 9))
    stopped = [s for s in samples if s.finish == "stop"]
    assert stopped
    for sample in samples:
        assert len(sample.logprobs) == len(sample.token_ids)
        assert not set(tokens(sample)[:-1]) & {7, 9}
        assert (tokens(sample)[-1] in (7, 9)) == (sample.finish == "stop")
        assert len(tokens(sample)) == 40 or sample.finish == "stop"


def test_only_the_tokens_that_are_given_end_a_response(collector):
    """The engine has no opinion of its own, not even on the model's eos (1): text.end_token_ids decides for all."""
    samples = generate(collector, [3, 4, 5], 32, max_new_tokens=100)
    assert {sample.finish for sample in samples} == {"length"}
    assert any(1 in tokens(sample) for sample in samples)


def test_the_samples_of_a_group_differ(collector):
    assert len({s.token_ids for s in generate(collector, [9, 8], 3, max_new_tokens=20, ignore_stops=True)}) == 3


@pytest.mark.slow
def test_a_seed_repeats_the_samples_of_a_fresh_engine(micro_checkpoint, tmp_path):
    def first_samples(seed):
        with EngineSession(options(micro_checkpoint, seed=seed), tmp_path / "engine.log") as session:
            return [tokens(generate(session.collector, [9, 8], max_new_tokens=20, ignore_stops=True)[0]) for _ in "12"]

    first, again, other = first_samples(5), first_samples(5), first_samples(6)
    assert first == again
    assert first[0] != first[1]
    assert first != other


@pytest.mark.parametrize(("mode", "finish", "length"), [("drain", "length", 100), ("abort", "abort", None)])
def test_pause_drains_or_aborts_what_runs(engine, collector, mode, finish, length):
    found = []
    arguments = (collector, [3, 4, 5], 4)
    how = {"max_new_tokens": 100, "ignore_stops": True}
    thread = threading.Thread(target=lambda: found.extend(generate(*arguments, **how)))
    thread.start()
    assert wait_until(lambda: collector.call(engine.client.counters())["samples_running"] == 4, 10)
    collector.call(engine.client.pause(mode))
    thread.join(10)
    collector.call(engine.client.resume())
    assert [s.finish for s in found] == [finish] * 4
    assert all(len(tokens(s)) == length if length else len(tokens(s)) < 100 for s in found)


def test_prompts_that_arrive_during_a_pause_wait_for_resume(engine, collector):
    collector.call(engine.client.pause("drain"))
    found = []
    thread = threading.Thread(target=lambda: found.extend(generate(collector, [3], max_new_tokens=2)))
    thread.start()
    thread.join(1)
    assert not found
    assert len(collector.call(engine.client.score([3, 4, 5]))) == 2, "scoring works while paused"
    collector.call(engine.client.resume())
    thread.join(10)
    assert len(found) == 1


def test_the_counters_add_up_to_the_tokens_that_came_out(engine, collector):
    before = collector.call(engine.client.counters())
    samples = generate(collector, [3, 4, 5], 8, max_new_tokens=17)
    after = collector.call(engine.client.counters())
    assert after["tokens_generated"] - before["tokens_generated"] == sum(len(tokens(s)) for s in samples)
    assert after["samples_running"] == 0
    assert after["incarnation"] == 0


def test_what_the_engine_cannot_do_is_refused_and_it_lives_on(engine, collector):
    with pytest.raises(EngineRefusedError, match="maximum model length of 128"):
        generate(collector, list(range(2, 40)) * 5)
    with pytest.raises(EngineRefusedError, match="pause mode 'never': one of drain, abort, keep"):
        collector.call(engine.client.pause("never"))
    assert generate(collector, [3], max_new_tokens=1)


def test_nothing_listens_beyond_loopback(engine):
    family = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    listening = [c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert set(listening) <= {"127.0.0.1", "::1"}


def test_a_killed_engine_is_noticed_and_a_restart_serves(micro_checkpoint, tmp_path, nothing_left):
    """A killed engine is noticed its calls fail and a restart serves."""
    lost = threading.Event()
    engine = Engine(options(micro_checkpoint), tmp_path / "engine.log", on_lost=lambda e: lost.set())
    collector = Collector(engine.client)
    errors = []

    def work():
        try:
            generate(collector, [3, 4], 4, max_new_tokens=120, ignore_stops=True)
        except EngineLostError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert wait_until(lambda: collector.call(engine.client.counters())["samples_running"] == 4, 10)
    first = engine.pid
    os.kill(first, signal.SIGKILL)
    assert lost.wait(NOTICE_SECONDS)
    thread.join(NOTICE_SECONDS)
    assert len(errors) == 1
    assert engine.lost.is_set()
    engine.restart()
    collector.attach(engine.client)
    assert collector.call(engine.client.counters())["incarnation"] == 1
    assert generate(collector, [3], max_new_tokens=1)
    second = engine.pid
    collector.close()
    engine.stop()
    nothing_left(os.getpid(), first, second)


OWNER = """
import json, sys, time
from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.supervisor import Engine
engine = Engine(EngineOptions(**json.loads(sys.argv[1])), sys.argv[2])
print(engine.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stage", ["serving", "starting"])
def test_an_engine_dies_with_its_killed_owner_and_leaves_nothing(micro_checkpoint, tmp_path, stage, nothing_left):
    arguments = {"model": str(micro_checkpoint), "max_model_len": 128, "kv_cache_mb": 64, "takes_updates": False}
    command = [sys.executable, "-c", OWNER, json.dumps(arguments), str(tmp_path / "engine.log")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if stage == "serving":
        pid = int(owner.stdout.readline())
    else:
        assert wait_until(lambda: psutil.Process(owner.pid).children(), 60)
        pid = psutil.Process(owner.pid).children()[0].pid
        time.sleep(3)
    owner.kill()
    owner.wait()
    nothing_left(owner.pid, pid)


def test_a_model_that_cannot_be_loaded_shows_the_log(tmp_path, nothing_left):
    """A model that cannot be loaded is an error with the end of the log."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "nonsense"}')
    with pytest.raises(EngineStartError, match="nonsense"):
        Engine(options(tmp_path), tmp_path / "engine.log")
    nothing_left(os.getpid())


def test_an_engine_that_does_not_get_ready_in_time_is_ended(micro_checkpoint, tmp_path):
    before = psutil.Process().children()
    with pytest.raises(EngineStartError, match="did not get ready in 1 s"):
        Engine(options(micro_checkpoint), tmp_path / "engine.log", start_seconds=1.0)
    assert psutil.Process().children() == before
