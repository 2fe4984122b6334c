"""A trainer sharded by FSDP2 publishes from every rank, a bucket gathered at a time; LoRA merges a tensor at a time."""

import gc
import json
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig

from oapl_engine.trainer.policy import published_weights
from oapl_engine.weights.bucket_layout import flat_slice, lay_out, skip_tied
from oapl_engine.weights.publish import Publisher, publish_paused
from tests.conftest import PROGRAMS
from tests.support.engines import ReceiverEngine

RANK = PROGRAMS / "sharded_rank.py"


@pytest.mark.parametrize("engines", [2, 1])
def test_two_ranks_gather_at_most_a_bucket_in_lockstep(tmp_path, engines):
    """engines = 1: rank 1 has none and only takes part in the gathers."""
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, str(rank), str(tmp_path / "store"), str(engines)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    reports = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    for rank, report in enumerate(reports):
        assert report["identical"] is (True if rank < engines else None)
        assert report["largest"] <= report["bucket_elements"] < report["model_elements"] / 3
        assert report["gathered"] == report["model_elements"] * report["publishes"], "each element once a publish"
        assert report["refused"] == (["ConnectionError"] * 4 if rank == 0 else [])


def test_no_tensor_of_a_lazy_source_is_kept():
    """No tensor of a lazy source is kept and equal addresses are not taken for ties."""
    alive = []

    def lazily():
        for i in range(6):
            gc.collect()
            alive.append(sum(ref() is not None for ref in made))
            tensor = torch.full((50,), float(i))
            made.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor

    made = []
    assert list(lay_out(lazily(), torch.float32, 1 << 10).shapes) == [f"t{i}" for i in range(6)]
    assert max(alive) <= 1


def test_tied_names_travel_once():
    weight = torch.zeros(3, 3)
    assert [name for name, _ in skip_tied([("a", weight), ("b", weight), ("c", weight.view(9))])] == ["a", "c"]


def test_elements_of_a_plain_tensor_are_a_view():
    tensor = torch.arange(12.0).view(3, 4)
    assert flat_slice(tensor, 5, 3).data_ptr() == tensor[1, 1:].data_ptr()


class Flat(torch.nn.Module):
    """An engine's model whose parameters are the trainer's, one by one."""

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.zeros(shape)))

    def load_weights(self, weights):
        for name, tensor in weights:
            getattr(self, name.replace(".", "_")).data.copy_(tensor)


def test_lora_is_merged_one_tensor_at_a_time(monkeypatch):
    """Lora is merged one tensor at a time and arrives as peft merges it."""
    from peft import get_peft_model
    from peft.tuners.lora.layer import Linear
    from transformers import LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(LlamaForCausalLM(config), settings)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    policy = SimpleNamespace(model=tuned.base_model.model)
    merged, alive, most, delta = 0, weakref.WeakSet(), 0, Linear.get_delta_weight

    def counted(self, adapter):
        nonlocal merged, most
        found = delta(self, adapter)
        alive.add(found)
        merged, most = merged + 1, max(most, len(alive))
        return found

    monkeypatch.setattr(Linear, "get_delta_weight", counted)
    engine = ReceiverEngine(Flat({name: t.shape for name, t in published_weights(policy)}))
    publisher = Publisher(lambda: published_weights(policy), engine, bucket_bytes=2048, dtype=torch.float32)
    publish_paused(publisher, 1)
    publisher.close()
    assert merged == 3 * 2 * 7, "shapes here, layout, publish: seven linears in two layers"
    assert most == 1
    monkeypatch.undo()
    reference = dict(tuned.merge_and_unload().named_parameters())
    assert len(reference) == 2 * 9 + 3
    for name, expected in reference.items():
        torch.testing.assert_close(getattr(engine.receiver.model, name.replace(".", "_")), expected, rtol=0, atol=1e-6)
