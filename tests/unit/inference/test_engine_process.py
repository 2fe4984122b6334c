"""The engine's process without vLLM: its temporary files."""

import asyncio
import socket
import subprocess
import tempfile
from types import SimpleNamespace

import pytest

from oapl_engine.inference import engine_process
from oapl_engine.inference.environment import engine_environment
from oapl_engine.inference.options import EngineOptions, ProcessOptions


@pytest.mark.parametrize("ranks", [1, 2])
def test_temporary_files_can_be_made_while_it_serves(ranks, tmp_path, monkeypatch):
    """Triton's compiler and those that it starts make some whenever a kernel is first used, as late as in an update."""
    folder = tmp_path / "engine"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    options = EngineOptions("model", tensor_parallel=ranks)
    made = []

    async def start(_):
        made.append(tempfile.mkdtemp())  # Python remembers the folder from now on
        return None, True

    async def serve(*_):
        with tempfile.NamedTemporaryFile() as ours:
            made.append(ours.name)
        made.append(subprocess.run(["mktemp"], check=True, capture_output=True, text=True).stdout.strip())

    monkeypatch.setattr(engine_process, "start_llm", start)
    monkeypatch.setattr(engine_process, "serve", serve)
    monkeypatch.setattr(engine_process, "EngineServer", lambda *_: None)
    monkeypatch.setattr(engine_process.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: None))
    owner, child = socket.socketpair()
    with owner:
        asyncio.run(engine_process.run(ProcessOptions(options, child.detach(), 0, str(folder))))
    assert made[0].startswith(str(folder))
    assert len(made) == 3
    assert folder.exists() == (ranks > 1), "one that is killed leaves nothing behind; ranks hold shared memory by it"


def test_compiled_code_outlives_the_temporary_folder(monkeypatch):
    """PyTorch keeps it in TMPDIR unless it is told, and makes that anew where it is gone."""
    place = engine_environment({}, EngineOptions("model"), "/folder", 0)["TORCHINDUCTOR_CACHE_DIR"]
    assert place.startswith(tempfile.gettempdir())
    own = engine_environment({"TORCHINDUCTOR_CACHE_DIR": "/cache"}, EngineOptions("model"), "/folder", 0)
    assert own["TORCHINDUCTOR_CACHE_DIR"] == "/cache"
