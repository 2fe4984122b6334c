"""The examples of docs/kernels.md, scheduler.md, weights.md and formats.md run, in order, and do what they say."""

import json
import re

import msgspec
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oapl_engine.scheduler import events
from oapl_engine.weights import publish, stock_server
from tests.conftest import ROOT
from tests.support.engines import ReceiverEngine
from tests.support.fused_model import FusedModel, trainer_tensors


def run_examples(page, names=None):
    """What the names are after the Python blocks of a page ran one after another."""
    names = names or {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def kernels():
    return run_examples("kernels.md")


def test_kernels_plain_loop_trains(kernels):
    assert float(kernels["hidden"].grad.abs().sum()) > 0
    assert float(kernels["main_gradient"].abs().sum()) > 0
    assert torch.equal(kernels["live"], kernels["master"].bfloat16())


def test_kernels_trl_example_matches_a_models_logits(kernels):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=97
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 97, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    logprob, entropy = kernels["per_token_logps_and_entropies"](model, ids, mask, 5, 0.7)
    logs = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits[:, -6:-1] / 0.7, -1)
    keep = mask[:, -5:]
    torch.testing.assert_close(logprob, logs.gather(2, ids[:, -5:, None])[..., 0] * keep)
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1) * keep)


def test_kernels_verl_example_matches_plain_torch(kernels):
    hidden, weight, ids = torch.randn(2, 7, 16), torch.randn(50, 16), torch.randint(0, 50, (2, 7))
    logprob, entropy = kernels["FusedLinearForPPO"]()(hidden, weight, ids, 1.3)
    logs = torch.log_softmax(hidden @ weight.T / 1.3, -1)
    torch.testing.assert_close(logprob, logs.gather(2, ids[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1))


def test_scheduler_examples_hold(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_examples("scheduler.md")["outcome"].seconds > 0


def test_scheduler_page_names_events_that_exist():
    text = "".join((ROOT / "docs" / name).read_text() for name in ("scheduler.md", "formats.md", "architecture.md"))
    for name in re.findall(r"`([A-Z]\w+)\(", text):
        assert hasattr(events, name), name


def test_weights_example_publishes(monkeypatch):
    """The server is stood in for here; tests/live/weights/test_live_stock_server.py has a real one."""
    engine, tensors = ReceiverEngine(FusedModel()), trainer_tensors()
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()})
    monkeypatch.setattr(stock_server, "StockServer", lambda url: engine)
    report = run_examples("weights.md", {"model": model, "url": "http://127.0.0.1:1"})["report"]
    assert isinstance(report, publish.PublishReport)
    assert report.changed_share > 0
    assert engine.phases[0] == "pause"
    assert engine.serving


def test_formats_event_is_one_of_the_schedulers():
    (line,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "formats.md").read_text(), re.S)
    assert isinstance(msgspec.convert(json.loads(line), events.ANY), events.Train)
