"""What every test may use: the command line as a user runs it, and a place for figures (`make test-slow`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "tests" / "support" / "programs"  # run as processes of their own
FIGURES: dict[str, object] = {}


def pytest_addoption(parser):
    parser.addoption(
        "--proofs", help="JSON file that keeps the figures that tests measured; those of tests not run now stay"
    )


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        for item in gpu if not torch.cuda.is_available() else ():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_sessionfinish(session):
    path = session.config.getoption("--proofs")
    if path and FIGURES:
        kept = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
        Path(path).write_text(json.dumps(kept | FIGURES, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@pytest.fixture
def figure(request):
    """figure(name, value): keep a measured figure for proofs.json under the test's name."""

    def keep(name, value):
        FIGURES.setdefault(request.node.nodeid.rpartition("::")[2], {})[name] = value

    return keep


@pytest.fixture
def oapl():
    """oapl("train", "x.toml", …) → CompletedProcess, in a process of its own."""

    def run(*arguments, cwd=ROOT, timeout=300, **environment):
        return subprocess.run(
            [sys.executable, "-m", "oapl_engine.cli", *map(str, arguments)],
            cwd=cwd, env={**os.environ, **environment}, capture_output=True, encoding="utf-8", timeout=timeout,
        )  # fmt: skip

    return run


@pytest.fixture
def refused(oapl):
    """refused(words, "train", …): bad input exits with 2, one line that holds the words, no traceback."""

    def check(words, *arguments, **keywords):
        done = oapl(*arguments, **keywords)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        for word in [words] if isinstance(words, str) else words:
            assert word in done.stderr, done.stderr
        return done

    return check


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory):
    """Folder of a micro model, warmed up on sorting 6 digits (about 20 s, once a session)."""
    from oapl_engine.sft import run_sft
    from oapl_engine.sft_config import load_sft_recipe

    out = tmp_path_factory.mktemp("models") / "micro"
    run_sft(load_sft_recipe(ROOT / "recipes" / "micro_sft.toml", ["--model.out", str(out), "--run.threads", "1"]))
    return out


@pytest.fixture(scope="session")
def micro_rollouts(micro_model, tmp_path_factory):
    """JSONL as `oapl rollouts` prints it: 48 prompts x 8 samples of the micro model, sampled by transformers."""
    from tests.support.sampling import write_rollouts

    path = tmp_path_factory.mktemp("rollouts") / "micro.jsonl"
    write_rollouts(micro_model, path, prompts=48, group_size=8)
    return path
