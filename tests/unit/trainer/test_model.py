"""Loading a policy: bad input is an error that says what to do, and no model is packed in a way it does not compute."""

import json
import logging

import numpy as np
import pytest
import torch
from oapl_kernels.objectives import oapl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GptOssConfig, Lfm2Config

from oapl_engine import config
from oapl_engine.errors import ConfigError
from oapl_engine.trainer.loading import load_policy
from oapl_engine.trainer.packing import pack
from oapl_engine.trainer.packing_mode import PACKING_MODES
from oapl_engine.trainer.packing_probe import choose_packing_mode
from oapl_engine.trainer.policy import Policy
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


def small(kind, **fields):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "pad_token_id": 0}
    fields = sizes | {"num_key_value_heads": 2, "num_hidden_layers": 2, "eos_token_id": 2, "bos_token_id": 1} | fields
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(kind(**fields)).float().eval()
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.2)
    return Policy(network, None, CPU, torch.float32)


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by the probe"])
def test_short_convolutions_go_alone(named, groups, caplog, monkeypatch):
    """Convolutions read the neighbouring row, another sequence's: noticed by name, and by the probe if unnamed.

    One at a time the model is trained as it is: log-probs equal its own.
    """
    if not named:
        monkeypatch.setattr("oapl_engine.trainer.packing_probe.packing_rule", lambda _: None)
    policy = small(Lfm2Config, layer_types=["conv", "full_attention"])
    with caplog.at_level(logging.WARNING):
        choose_packing_mode(policy)
    assert (policy.packing_mode.share, policy.packing_mode.together) == (False, False)
    assert ("conv layers read other rows" if named else "packed log-probs are off by") in caplog.text
    items = groups.items([groups.make(0, 9, [5, 7])])
    batches = policy.batches(items, 1000, True)
    assert [len(b.keys) for b in batches] == [1, 1]
    for batch, rollout in zip(batches, items[0].rollouts, strict=True):
        ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
        expected = policy.model(ids[None]).logits[0, 8:-1].log_softmax(-1).gather(1, ids[9:, None])[:, 0]
        torch.testing.assert_close(policy.logprob(batch, 1.0), expected, atol=1e-5, rtol=1e-5)
    (packed,) = pack(items, 1000, True)
    with pytest.raises(RuntimeError, match="2 sequences in a batch, but"):
        policy.hidden(packed)


def test_attention_sinks_are_noticed(caplog):
    """gpt-oss adds a learned sink to every softmax, which oapl_packed does not know: the probe sees it."""
    policy = small(GptOssConfig, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    with caplog.at_level(logging.WARNING):
        choose_packing_mode(policy)
    assert not policy.packing_mode.together
    assert "prompts are not shared, nor rows packed: packed log-probs are off by" in caplog.text


def test_a_head_that_is_not_known_is_an_error(make_policy, monkeypatch):
    """A model that transforms its logits in a way that we do not: refused, never trained wrongly."""
    policy = make_policy()
    real = type(policy.model).forward

    def scaled(self, **kwargs):
        out = real(self, **kwargs)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(type(policy.model), "forward", scaled)
    policy.model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="LlamaForCausalLM: log-probs differ from the model's own"):
        choose_packing_mode(policy)


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
