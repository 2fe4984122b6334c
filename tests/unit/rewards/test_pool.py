"""The pool: a bad verifier costs its own verdict and nothing else."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from oapl_engine.errors import ConfigError
from oapl_engine.rewards import VerifierPool, verify
from tests.conftest import ROOT

SUPPORT = ROOT / "tests" / "support"  # bad_verifiers
RECORD = {"answer": "1"}


@pytest.fixture(autouse=True)
def _import_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))


@pytest.fixture
def pool():
    with closing(VerifierPool(1, timeout_seconds=20, memory_mb=512)) as made:
        yield made


def bad(name):
    return f"bad_verifiers:{name}"


def children():
    return {p.pid for p in psutil.Process().children(recursive=True)}


def gone(pid, seconds=20):
    """Whether the process ends within `seconds` (a zombie has ended)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def ask(pool, *request):
    return asyncio.run(pool.verify(*request))


def still_works(pool):
    return ask(pool, bad("good"), "1", RECORD).reward == 1


def test_pool_agrees_with_verify(pool):
    cases = [
        ("exact", "1", RECORD, {}),
        ("exact", "so 2", RECORD, {"extract": "last_number"}),
        ("math", r"\boxed{\frac{2}{2}}", RECORD, {}),
        ("exact", "1", {}, {}),
        (bad("raises"), "1", RECORD, {}),
        (bad("nan"), "1", RECORD, {}),
    ]
    for case in cases:
        assert ask(pool, *case) == verify(*case)


def test_unknown_names_are_refused_before_a_worker_sees_them(pool):
    with pytest.raises(ConfigError, match="did you mean exact"):
        ask(pool, "exat", "1", RECORD)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ask(pool, "no_module:f", "1", RECORD)


@pytest.mark.parametrize("name", ["sleeps", "backtracks"])
def test_a_hanging_verifier_is_killed_and_invalid(name):
    with VerifierPool(1, timeout_seconds=0.3) as pool:
        verdict = ask(pool, bad(name), "1", RECORD)
        assert (verdict.status, verdict.reward) == ("invalid", None)
        assert "0.3 s (reward.timeout_seconds)" in verdict.detail["reason"]
        verdict = ask(pool, bad(name), "1", RECORD)
        assert verdict.status == "invalid"


def test_the_time_limit_does_not_count_imports():
    with closing(VerifierPool(1, timeout_seconds=0.5)) as pool:  # importing math-verify takes longer
        assert ask(pool, "math", "1", RECORD).reward == 1


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("segfaults", "error", "SIGSEGV"),
        ("exits", "error", "exited with status 7"),
        ("raises", "error", "broken inside"),
        ("eats_memory", "invalid", "reward.memory_mb"),
        ("nan", "invalid", "nan"),
    ],
)
def test_a_failing_verifier_gives_its_reason(pool, name, status, reason):
    """The pool works afterwards."""
    verdict = ask(pool, bad(name), "1", RECORD)
    assert (verdict.status, verdict.reward) == (status, None)
    assert reason in verdict.detail["reason"]
    assert still_works(pool)


def test_printing_and_long_details_disturb_nothing(pool, capfd):
    assert ask(pool, bad("prints"), "1", RECORD).reward == 1
    verdict = ask(pool, bad("long_detail"), "1", RECORD)
    assert verdict.reward == 1
    assert "left out" in verdict.detail["reason"]
    assert still_works(pool)
    assert capfd.readouterr().out == ""


def test_a_worker_serves_many_verdicts(pool):
    pids = {ask(pool, bad("good"), "1", RECORD).detail["pid"] for _ in range(3)}
    assert len(pids) == 1
    assert os.getpid() not in pids


def test_forks_of_a_verifier_do_not_survive_it(pool, tmp_path):
    file = tmp_path / "pid"
    file.touch()
    assert ask(pool, bad("forks"), "1", {"file": str(file)}).reward == 1
    assert gone(int(file.read_text()))
    assert still_works(pool)


def test_a_fork_that_returns_gives_no_second_verdict(pool):
    assert [ask(pool, bad("forks_and_returns_twice"), "1", RECORD).reward for _ in range(3)] == [1, 1, 1]
    assert ask(pool, bad("good"), "2", RECORD).reward == 0


def test_many_keep_their_order_on_several_workers():
    with closing(VerifierPool(2, timeout_seconds=20)) as pool:
        answers = [str(i % 3) for i in range(40)]
        verdicts = pool.verify_many("exact", [(a, RECORD) for a in answers])
        assert [v.reward for v in verdicts] == [float(a == "1") for a in answers]


def test_async_verdicts_run_beside_a_hanging_one():
    async def both(pool):
        hanging = asyncio.create_task(pool.verify(bad("sleeps"), "1", RECORD))
        quick = [await pool.verify("exact", "1", RECORD) for _ in range(5)]
        return quick, hanging.done(), await hanging

    with closing(VerifierPool(2, timeout_seconds=3)) as pool:
        pool.verify_many("exact", [("1", RECORD)] * 2)  # both processes have started
        quick, hanging_was_done, verdict = asyncio.run(both(pool))
    assert [v.reward for v in quick] == [1] * 5
    assert not hanging_was_done
    assert verdict.status == "invalid"


def test_close_leaves_no_process_and_no_descriptor():
    before, descriptors = children(), psutil.Process().num_fds()
    pool = VerifierPool(2, timeout_seconds=0.2)
    ask(pool, bad("sleeps"), "1", RECORD)
    assert len(children() - before) == 2
    pool.close()
    pool.close()
    assert children() <= before
    assert psutil.Process().num_fds() == descriptors


def test_close_ends_a_verdict_under_way():
    pool = VerifierPool(1, timeout_seconds=3600)
    future = pool._submit(bad("sleeps"), "1", RECORD, {})
    pool.close()
    assert future.cancelled() or future.result().status == "error"


OWNER = """
import asyncio
from oapl_engine.rewards import VerifierPool
import sys
pool = VerifierPool(1, timeout_seconds=3600)
asyncio.run(pool.verify("bad_verifiers:sleeps_and_tells", "1", {"file": sys.argv[1]}))
"""


def test_workers_die_with_a_killed_owner(tmp_path):
    """Even while they hold the GIL."""
    file = tmp_path / "pid"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), str(ROOT)])}
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(file)], env=env)
    while not (file.exists() and file.read_text()):
        assert owner.poll() is None
        time.sleep(0.02)
    worker = int(file.read_text())
    assert psutil.pid_exists(worker)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert gone(worker)


def test_a_worker_imports_neither_pydantic_nor_torch():
    program = "import sys, oapl_engine.rewards.worker; print({'pydantic', 'torch'} & sys.modules.keys())"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_workers_hold_no_torch(pool):
    pid = ask(pool, bad("good"), "1", RECORD).detail["pid"]
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "libpython" in maps or "python" in maps
    assert "libtorch" not in maps
