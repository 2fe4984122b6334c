"""The examples of docs/kernels.md run, in order, and do what they say."""

import re

import pytest
import torch

from tests.conftest import ROOT

DOCUMENT = ROOT / "docs" / "kernels.md"


@pytest.fixture(scope="module")
def examples():
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    names = {}
    for block in blocks:
        exec(compile(block, DOCUMENT.name, "exec"), names)
    return names


def test_the_plain_loop_trains(examples):
    assert float(examples["hidden"].grad.abs().sum()) > 0
    assert float(examples["main_gradient"].abs().sum()) > 0
    assert torch.equal(examples["live"], examples["master"].bfloat16())


def test_the_trl_example_matches_the_logits_of_a_model(examples):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=97
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 97, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    logprob, entropy = examples["per_token_logps_and_entropies"](model, ids, mask, 5, 0.7)
    logs = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits[:, -6:-1] / 0.7, -1)
    keep = mask[:, -5:]
    torch.testing.assert_close(logprob, logs.gather(2, ids[:, -5:, None])[..., 0] * keep)
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1) * keep)


def test_the_verl_example_matches_plain_torch(examples):
    hidden, weight, ids = torch.randn(2, 7, 16), torch.randn(50, 16), torch.randint(0, 50, (2, 7))
    logprob, entropy = examples["FusedLinearForPPO"]()(hidden, weight, ids, 1.3)
    logs = torch.log_softmax(hidden @ weight.T / 1.3, -1)
    torch.testing.assert_close(logprob, logs.gather(2, ids[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1))


def test_the_figures_are_those_of_the_file(capsys):
    from benchmarks import kernels

    assert kernels.main(["--show", str(DOCUMENT.parents[1] / "benchmarks" / "data" / "kernels.json")]) == 0
    shown = [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()]
    assert "\n".join(shown) in DOCUMENT.read_text()
    assert len(shown) > 20
