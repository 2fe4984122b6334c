"""A stock vLLM server with our plugin takes the same updates over its own endpoints, and survives its trainers."""

import re
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch

from oapl_engine.weights.control import Start
from oapl_engine.weights.publish import Publisher, publish_paused
from oapl_engine.weights.stock_server import StockServer
from tests.conftest import PROGRAMS, ROOT
from tests.support.models import make_served_llama
from tests.support.rig import NEW_TOKENS, VOCABULARY, greedy
from tests.support.stock_server import ServerProcess

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(1800)]

DOCUMENT = ROOT / "docs" / "weights.md"
BLOCKS = [("", "api_server"), ("python", "Publisher")]
PHASES = ["pause", "init", "start", "bucket", "finish", "attest", "resume"]
KILLS = 15


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    model = make_served_llama(folder / "model", tied=True)
    server = ServerProcess(folder / "model", folder / "log")
    server.model, server.folder = model, folder
    yield server
    server.close()


@pytest.fixture
def prompts():
    rng = np.random.default_rng(0)
    return rng.integers(2, VOCABULARY, (6, 8))


def change(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05 * (parameter.std() if parameter.ndim > 1 else 0.1)


def make_publisher(server):
    control = StockServer(server.url)
    return Publisher(server.model.named_parameters, control, bucket_bytes=64 << 10, dtype=torch.float32)


def publish(server, version):
    publisher = make_publisher(server)
    try:
        return publish_paused(publisher, version)
    finally:
        publisher.close()


def test_publishes_are_exact_and_only_loopback_listens(server, prompts):
    """Three publishes are token exact and nothing listens beyond loopback."""
    assert server.greedy(prompts, NEW_TOKENS) == greedy(server.model, prompts)
    for version in (1, 2, 3):
        change(server.model)
        report = publish(server, version)
        assert report.changed_share > 0.9
        assert server.version() == str(version)
        assert server.greedy(prompts, NEW_TOKENS) == greedy(server.model, prompts)
    assert {ip for ip in server.listeners() if ip not in ("127.0.0.1", "::1")} == set()


def test_a_server_waits_paused_for_the_next_trainer_when_one_is_killed(server, prompts, figure):
    """At every phase; the next trainer, here this process, publishes a whole version."""
    version, script = 3, PROGRAMS / "trainer_of_stock.py"
    for kill in range(KILLS):
        old = greedy(server.model, prompts)
        change(server.model)
        server.model.save_pretrained(server.folder / "next")
        whole = greedy(server.model, prompts)
        arguments = [server.url, server.folder / "next", str(version + 1), PHASES[kill % len(PHASES)]]
        died = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)
        assert died.returncode == -9, died.stderr
        served = server.greedy(prompts, NEW_TOKENS, timeout=1)
        assert served is None or (served == old and PHASES[kill % len(PHASES)] == "pause"), "paused, or untouched"
        version += 2
        publish(server, version)
        assert server.greedy(prompts, NEW_TOKENS) == whole
    figure("trainers of a stock server killed, 0 mixed versions served", KILLS)


def test_the_example_of_the_documentation_publishes(server, prompts):
    text = DOCUMENT.read_text()
    command, code = (re.search(rf"```{kind}\n([^`]*{mark}.*?)```", text, re.S)[1] for kind, mark in BLOCKS)
    helper = (ROOT / "tests" / "support" / "stock_server.py").read_text()
    for word in re.findall(r"--[a-z-]+|VLLM_[A-Z_]+|oapl_engine[\w.]+", command):
        assert word in helper, f"{word}: this server runs without it"
    change(server.model)
    names = {"model": server.model, "url": server.url}
    exec(compile(code.replace("version=1", "version=500"), DOCUMENT.name, "exec"), names)
    assert names["report"].version == 500
    assert server.greedy(prompts, NEW_TOKENS) == greedy(server.model, prompts)


def test_a_server_resumed_in_mid_update_serves_no_mix(server, prompts):
    """A server that is resumed in mid update dies rather than serve a mix."""
    publisher = make_publisher(server)
    publish_paused(publisher, 1000)
    publisher.control.pause("abort")
    assert publisher.control.update(Start(1001)).error is None
    server.open(urllib.request.Request(server.url + "/resume", b"{}"), timeout=30).read()
    assert server.greedy(prompts, 1, timeout=30) is None
    publisher.close()
