"""Loading a policy: bad input is an error that says what to do, and no model is packed in a way it does not compute."""

import json

import numpy as np
import pytest
import torch
from oapl_kernels.objectives import oapl
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from oapl_engine import config
from oapl_engine.errors import ConfigError
from oapl_engine.trainer.loading import load_policy
from oapl_engine.trainer.packing import pack
from oapl_engine.trainer.packing_mode import PACKING_MODES
from oapl_engine.trainer.score import score
from oapl_engine.trainer.step import accumulate_gradients

CPU = torch.device("cpu")


def load(path, model=None, **train):
    return load_policy(config.ModelConfig(path=str(path), **(model or {})), config.TrainConfig(**train), CPU)


def test_loads(model_folder):
    policy = load(model_folder(), precision="float32")
    assert policy.packing_mode == PACKING_MODES[0]
    assert policy.matmul_dtype == torch.float32
    assert policy.vocabulary == 97
    assert all(p.dtype == torch.float32 and p.requires_grad for p in policy.trainable().values())


def test_auto_precision_follows_the_hardware(model_folder):
    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert load(model_folder()).matmul_dtype == (torch.bfloat16 if able else torch.float32)
    assert load(model_folder(), {"dtype": "bfloat16"}).matmul_dtype == torch.bfloat16


@pytest.mark.parametrize(("precision", "sees"), [("bfloat16", False), ("float32", True)])
def test_bfloat16_products_are_blind_to_small_updates(model_folder, groups, precision, sees):
    """Updates below bfloat16's spacing: a float32 engine would see them, the trainer would not, so it is refused."""
    policy = load(model_folder(), precision=precision)
    products = [p for name, p in policy.model.named_parameters() if name.endswith("_proj.weight")]
    with torch.no_grad():
        for weight in products:
            weight.copy_(weight.bfloat16())  # as in most checkpoints
    some = [groups.make(0, 5, (4, 6))]
    before = score(policy, some, temperature=1.0, token_budget=512)
    with torch.no_grad():
        for weight in products:
            weight.mul_(1 + 2**-10)  # a quarter of bfloat16's spacing at most
    after = score(policy, some, temperature=1.0, token_budget=512)
    assert any(not np.array_equal(before[key], after[key]) for key in before) == sees


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def damage_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def _nan(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan


BAD = {
    "no config.json": (lambda f: (f / "config.json").unlink(), r"has no config\.json: name a folder in Hugging"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], r"has no tokenizer: add tokenizer\.json"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        r"weights .*model\.safetensors are damaged or truncated .*: fetch the model again",
    ),
    "NaN": (lambda f: damage_weights(f, _nan), r"weight model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"),
    "a weight missing": (
        lambda f: damage_weights(f, lambda w: w.pop("model.norm.weight")),
        r"lacks 1 weights, among them model\.norm\.weight: incomplete",
    ),
    "unknown architecture": (lambda f: edit_config(f, model_type="nonsense"), r"cannot be loaded: .*nonsense"),
    "a field of another type": (lambda f: edit_config(f, hidden_size="wide"), r"cannot be loaded: .*hidden_size"),
    "sizes that do not fit": (lambda f: edit_config(f, num_attention_heads=5), r"(?s)cannot be .*attention heads"),
    "not a causal LM": (
        lambda f: edit_config(f, architectures=["LlamaForSequenceClassification"]),
        r"holds LlamaForSequenceClassification, not a causal LM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_folders(case, model_folder):
    change, message = BAD[case]
    folder = model_folder()
    change(folder)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_other_bad_inputs(model_folder, tmp_path):
    with pytest.raises(ConfigError, match=r'model.path = "./nowhere" cannot be loaded'):
        load("./nowhere")
    BertForMaskedLM(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="holds BertForMaskedLM, not a causal LM"):
        load(tmp_path / "bert")
    with pytest.raises(ConfigError, match="the tokenizer has 203 tokens but the head only 97 rows"):
        load(model_folder(words=200))
    with pytest.raises(ConfigError, match=r'model.attention = "flash": flash-attn cannot run on cpu'):
        load(model_folder(), {"attention": "flash"})
    with pytest.raises(ConfigError, match=r'train.precision = "float32" with model.dtype = "bfloat16"'):
        load(model_folder(), {"dtype": "bfloat16"}, precision="float32")


def test_lora(model_folder, groups):
    """Only adapters train; the frozen head gets no gradient, and the adapters' gradient is not zero."""
    policy = load(model_folder(), {"lora_rank": 4}, precision="float32")
    assert all(".lora_" in name for name in policy.trainable())
    items = groups.items([groups.make(0, 9, [5, 7])])
    accumulate_gradients(policy, pack(items, 100, True), oapl(beta2=0.1), normalizer=2)
    assert policy.head.weight.grad is None
    assert any(p.grad.any() for p in policy.trainable().values())


def test_dropout_is_off_and_layers_compile(make_policy, model_folder, monkeypatch):
    folder = model_folder()
    edit_config(folder, attention_dropout=0.5)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((type(self), options)))
    policy = load(folder, compile=True, checkpoint_activations=True, precision="float32")
    assert [kind.__name__ for kind, options in compiled if options == {"dynamic": True}] == ["LlamaDecoderLayer"] * 2
    (batch,) = pack_one(policy)
    assert [type(m).__name__ for m in policy.model.modules() if m.training] == ["LlamaDecoderLayer"] * 2
    assert torch.equal(policy.logprob(batch, 1.0), policy.logprob(batch, 1.0))


def pack_one(policy):
    from oapl_engine.trainer.packing_probe import probe_groups

    return policy.batches(probe_groups(97), 1000, True)


def test_a_model_that_cannot_recompute_is_refused(model_folder, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"train.checkpoint_activations: LlamaForCausalLM cannot; set it to false"):
        load(model_folder(), checkpoint_activations=True)
