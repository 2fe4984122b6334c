"""A worker with a mix of two versions computes nothing, however it computes."""

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from oapl_engine.weights.receiver.mix_guard import refusing_a_mix
from oapl_engine.weights.receiver.update import InPlaceUpdate


class GraphWorker:
    """Replays what was captured, as vLLM's worker does with a full CUDA graph: the model is not called."""

    def __init__(self, model):
        self.weight_transfer_engine = SimpleNamespace(update=InPlaceUpdate(model))
        self.replayed = 0

    def execute_model(self, scheduler_output):
        self.replayed += 1
        return scheduler_output


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(GraphWorker, "execute_model", refusing_a_mix(GraphWorker.execute_model))
    return GraphWorker(torch.nn.Linear(2, 2))


def step(tokens):
    return SimpleNamespace(total_num_scheduled_tokens=tokens)


def test_a_replayed_graph_computes_with_no_mix(worker):
    update = worker.weight_transfer_engine.update
    worker.execute_model(step(1))
    update.state = "incomplete"
    with pytest.raises(RuntimeError, match="weights are incomplete"):
        worker.execute_model(step(1))
    worker.execute_model(step(0))
    update.state = "complete"
    worker.execute_model(step(1))
    assert worker.replayed == 3


def test_a_worker_of_another_backend_is_left_alone(worker):
    for engine in (None, SimpleNamespace()):
        worker.weight_transfer_engine = engine
        worker.execute_model(step(1))
    assert worker.replayed == 2


def test_the_guard_is_put_in_once():
    guarded = refusing_a_mix(GraphWorker.execute_model)
    assert refusing_a_mix(guarded) is guarded


def test_vllms_workers_compute_where_the_guard_stands():
    """Its CPU and XPU workers inherit the GPU's execute_model, whose only argument says how many tokens there are."""
    if (vllm := importlib.util.find_spec("vllm")) is None:
        pytest.skip("vLLM is not installed")
    folder = Path(vllm.origin).with_name("v1") / "worker"
    found = {}
    for name in ("gpu", "cpu", "xpu"):
        tree = ast.parse((folder / f"{name}_worker.py").read_text(encoding="utf-8"))
        worker = next(c for c in tree.body if isinstance(c, ast.ClassDef) and c.name.endswith("Worker"))
        methods = [m for m in worker.body if getattr(m, "name", None) == "execute_model"]
        found[name] = [[argument.arg for argument in method.args.args] for method in methods]
    assert found == {"gpu": [["self", "scheduler_output"]], "cpu": [], "xpu": []}
