"""No model is packed in a way that it does not compute: what is right is its own eager attention."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, Lfm2Config, MptConfig

from oapl_engine.errors import ConfigError
from oapl_engine.trainer import attention
from oapl_engine.trainer.packing import pack
from oapl_engine.trainer.packing_mode import PACKING_MODES, packing_rule
from oapl_engine.trainer.packing_probe import choose_packing_mode, largest_difference, unpacked_logprob
from oapl_engine.trainer.policy import Policy

CPU = torch.device("cpu")


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


def difference_from_eager(policy, groups):
    """In nats, over sequences much longer than those of the probe."""
    items = groups.items([groups.make(0, 40, [50, 7, 20]), groups.make(1, 3, [9, 30])])
    batches = policy.batches(items, 1000, True)
    with torch.no_grad():
        found = {
            key: value
            for batch in batches
            for key, value in zip(
                batch.keys, policy.logprob(batch, 1.0).split(np.diff(batch.cu_seqlens).tolist()), strict=True
            )
        }
    policy.model.set_attn_implementation("eager")
    own = {r.key: unpacked_logprob(policy.model, r, CPU) for item in items for r in item.rollouts}
    return largest_difference(found, own)


SOFTCAP = {"head_dim": 8, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1}


@pytest.mark.parametrize("packs", [True, False])
def test_eager_is_right_where_sdpa_differs(packs, groups, caplog, monkeypatch):
    """sdpa drops the soft-cap: said with the figure; trained is eager's mathematics, packed or one by one."""
    policy = small(Gemma2Config, **SOFTCAP)
    if not packs:
        monkeypatch.setattr("oapl_engine.trainer.packing_probe.packing_rule", lambda _: "a rule")
    with caplog.at_level(logging.WARNING):
        choose_packing_mode(policy)
    assert policy.packing_mode.share == packs
    assert policy.model.config._attn_implementation == (attention.NAME if packs else "eager")
    assert 'Gemma2ForCausalLM: transformers\' attention "sdpa" is off by' in caplog.text
    assert difference_from_eager(policy, groups) < 1e-4


def test_sdpa_serves_one_by_one_where_it_agrees(groups):
    """It needs less memory than eager."""
    policy = small(Lfm2Config, layer_types=["conv", "full_attention"])
    choose_packing_mode(policy)
    assert policy.model.config._attn_implementation == "sdpa"
    assert difference_from_eager(policy, groups) < 1e-4


def test_sinks_are_in_the_softmax(groups):
    """gpt-oss: a learned score of each head, in layers with and without a window."""
    policy = small(GptOssConfig, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=9)
    choose_packing_mode(policy)
    assert policy.packing_mode == PACKING_MODES[0]
    assert difference_from_eager(policy, groups) < 1e-4


def test_windows_longer_than_the_probe_are_seen(caplog, monkeypatch):
    """The probe shortens them for its time: packed attention that ignores them does not pass."""
    real = attention._mask
    monkeypatch.setattr(attention, "_mask", lambda plan, piece, window: real(plan, piece, None))
    policy = small(Gemma2Config, head_dim=8, sliding_window=500)
    with caplog.at_level(logging.WARNING):
        choose_packing_mode(policy)
    assert not policy.packing_mode.together
    assert policy.model.config.sliding_window == 500
    assert [layer.self_attn.sliding_window for layer in policy.model.model.layers] == [500, None]


def test_a_mask_of_its_own_is_not_ignored(make_policy, groups):
    """What a model hides from itself in long sequences only, the probe cannot see."""
    policy = make_policy()
    (batch,) = pack(groups.items([groups.make(0, 8, [4, 4])]), 100, True)
    mask = torch.zeros(1, 1, 15, 15)
    layer = policy.model.model.layers[0].self_attn
    real = layer.forward
    layer.forward = lambda **keywords: real(**keywords | {"attention_mask": mask})
    with pytest.raises(RuntimeError, match="LlamaAttention has an attention mask of its own"):
        policy.hidden(batch)


def test_nan_is_a_difference():
    """max(0.0, nan) is 0.0 in Python."""
    own = {"a": torch.tensor([-1.0, -2.0]), "b": torch.tensor([-3.0])}
    assert not largest_difference(own | {"a": torch.tensor([-1.0, torch.nan])}, own) <= 1.0
    assert not largest_difference(own | {"b": torch.tensor([torch.nan])}, own) <= 1.0
    assert largest_difference(own, own) == 0.0


@pytest.mark.parametrize("error", [AttributeError, KeyError, AssertionError, RuntimeError])
def test_whatever_a_forward_pass_raises_is_a_reason(error, make_policy, monkeypatch):
    policy = make_policy()

    def fail(*arguments, **keywords):
        raise error("broken")

    monkeypatch.setattr(attention, "segment_attention", fail)
    choose_packing_mode(policy)
    assert "the packed forward pass failed: " + error.__name__ in policy.packing_mode.reason
    assert not policy.packing_mode.together
    monkeypatch.setattr(type(policy.model.model), "forward", fail)
    with pytest.raises(ConfigError, match=f"LlamaForCausalLM: its own forward pass failed: {error.__name__}"):
        choose_packing_mode(policy)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope RoPE"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}, "x": {"rope_type": "dynamic"}}}, "dynamic RoPE"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "dynamic RoPE"),
        ({"layer_types": ["full_attention", "conv"]}, "conv layers"),
        ({"attn_temperature_tuning": True}, "attention temperature"),
        ({"alibi": True}, "ALiBi"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "layer_types": ["sliding_attention"]}, None),
        ({"rope_parameters": None}, None),
    ],
)
def test_rules_for_what_a_probe_is_too_short_for(fields, reason):
    found = packing_rule(SimpleNamespace(**fields))
    assert found is None if reason is None else reason in found


def test_what_has_no_attention_interface_goes_alone(caplog):
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=97)
    network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    policy = Policy(network, None, CPU, torch.float32)
    with caplog.at_level(logging.WARNING):
        choose_packing_mode(policy)
    assert not policy.packing_mode.together
    assert "MptForCausalLM does not take its attention from transformers' AttentionInterface" in caplog.text
