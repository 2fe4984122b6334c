"""Packed and shared rows give the log-probs and gradients of one sequence at a time: exact, only fewer tokens.

Gradients are compared, not weights after Adam, whose small epsilon turns tiny gradients into full steps.
"""

import dataclasses

import numpy as np
import pytest
import torch
from oapl_kernels.objectives import OBJECTIVES, oapl

from oapl_engine import config
from oapl_engine.trainer import attention
from oapl_engine.trainer.loading import _prepare_training
from oapl_engine.trainer.objective import make_objective
from oapl_engine.trainer.packing import pack
from oapl_engine.trainer.score import fill_logprobs, score
from oapl_engine.trainer.step import accumulate_gradients

BETA2 = 0.1
MODELS = ["llama", "llama_tied", "qwen2", "qwen3", "gemma2"]


def squared(count):
    return lambda log_ratio, advantage: (BETA2 * log_ratio - advantage) ** 2 / count


def ours(policy, batches, count, temperature=1.0):
    losses = accumulate_gradients(policy, batches, oapl(beta2=BETA2), normalizer=count, temperature=temperature)
    gradients = {name: p.grad.clone() for name, p in policy.trainable().items()}
    policy.model.zero_grad(set_to_none=True)
    pairs = list(zip(batches, losses, strict=True))
    parts = {b.keys: np.split(loss.logprob.numpy(), b.cu_seqlens[1:-1]) for b, loss in pairs}
    return {k: v for keys, values in parts.items() for k, v in zip(keys, values, strict=True)}, gradients


def largest(a, b):
    return max(float(np.abs(a[key] - b[key]).max()) for key in b)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [False, True], ids=["unshared", "shared"])
def test_float32(name, share, make_policy, groups, gold, relative, figure):
    """Ragged, several turns, two micro-batches or more: log-probs within 1e-4 and gradients within 5e-6 of gold."""
    policy, items = make_policy(name), groups.items(groups.ragged(turns=True))
    assert policy.packing_mode.share
    logprob, gradients = ours(policy, pack(items, 400, share), 14, 0.7)
    expected, exact = gold(policy.model, items, squared(14), 0.7)
    figure("logprob", largest(logprob, expected))
    figure("gradient", relative(gradients, exact))
    assert largest(logprob, expected) <= 1e-4
    assert relative(gradients, exact) <= 5e-6


@pytest.mark.parametrize("share", [False, True], ids=["unshared", "shared"])
def test_float64(share, make_policy, groups, gold, relative):
    """In float64 the difference is that of rounding: 1e-12. Nothing is approximated."""
    policy, items = make_policy("llama", torch.float64), groups.items(groups.ragged())
    norms = {n: m for n, m in policy.model.named_modules() if type(m).__name__ == "LlamaRMSNorm"}
    for name, norm in norms.items():
        # transformers' norm computes in float32 whatever it is given
        exact_norm = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
        exact_norm.weight = norm.weight
        policy.model.set_submodule(name, exact_norm)
    batches = [_with_float64_inputs(b) for b in pack(items, 10_000, share)]
    _, gradients = ours(policy, batches, 14)
    _, exact = gold(policy.model, items, squared(14))
    assert relative(gradients, exact) <= 1e-12


def _with_float64_inputs(batch):
    wide = batch.behavior_logprob.astype(np.float64)
    return dataclasses.replace(batch, behavior_logprob=wide, advantage=batch.advantage.astype(np.float64))


def test_padded_as_in_hugging_face(make_policy, groups, relative):
    """Against the stock padded batch with an attention mask, ragged: log-probs 1e-4, gradients 1e-5 relative."""
    policy, items = make_policy(), groups.items(groups.ragged())
    logprob, gradients = ours(policy, pack(items, 10_000, False), 14)
    expected, exact = padded(policy.model, items, 14)
    assert largest(logprob, expected) <= 1e-4
    assert relative(gradients, exact) <= 1e-5


def padded(network, items, count):
    network.set_attn_implementation("sdpa")
    rollouts = [(r, float(a)) for item in items for r, a in zip(item.rollouts, item.advantage, strict=True)]
    width = max(len(r.token_ids) for r, _ in rollouts)
    ids = torch.zeros(len(rollouts), width, dtype=torch.long)
    mask = torch.zeros(len(rollouts), width, dtype=torch.long)
    for i, (r, _) in enumerate(rollouts):
        ids[i, : len(r.token_ids)] = torch.from_numpy(r.token_ids)
        mask[i, : len(r.token_ids)] = 1
    logprobs = network(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    found, loss = {}, 0.0
    for i, (r, advantage) in enumerate(rollouts):
        scored = np.flatnonzero(r.loss_mask)
        values = logprobs[i, scored - 1, ids[i, scored]]
        behavior = torch.from_numpy(r.behavior_logprob[scored])
        loss = loss + squared(count)((values - behavior).sum(), advantage)
        found[r.key] = values.detach().numpy()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters()}
    network.set_attn_implementation(attention.NAME)
    return found, gradients


@pytest.mark.parametrize("share", [False, True], ids=["unshared", "shared"])
def test_micro_batches_add_up(share, make_policy, groups, relative):
    """One batch and many micro-batches, groups split between them, have the same gradient."""
    policy, items = make_policy("qwen3"), groups.items(groups.ragged())
    many, one = pack(items, 60, share), pack(items, 10_000, share)
    assert len(one) == 1
    assert len(many) > 6
    assert relative(ours(policy, many, 14)[1], ours(policy, one, 14)[1]) <= 5e-6


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_adds_up_with_its_options(name, make_policy, groups, relative):
    """The same with an entropy bonus and a KL to a reference: complete sequences, one normaliser for the step."""
    policy, reference, items = make_policy("qwen3"), make_policy("llama"), groups.items(groups.ragged())
    objective = make_objective(config.ObjectiveConfig(name=name, reference_coefficient=0.1), BETA2)

    def gradients(budget):
        batches = fill_logprobs("reference_logprob", reference, pack(items, budget, True), 1.0)
        batches = fill_logprobs("proximal_logprob", policy, batches, 1.0)
        accumulate_gradients(policy, batches, objective, normalizer=14, temperature=1.0, entropy_coefficient=0.01)
        found = {n: p.grad.clone() for n, p in policy.trainable().items()}
        policy.model.zero_grad(set_to_none=True)
        return len(batches), found

    (many, parts), (one, whole) = gradients(60), gradients(10_000)
    assert (many > 6, one) == (True, 1)
    assert relative(parts, whole) <= 5e-6


def test_checkpointed_activations(make_policy, groups, relative):
    """The plan reaches attention in recomputation too: the same gradient."""
    policy, items = make_policy(), groups.items(groups.ragged())
    _, plain = ours(policy, pack(items, 400, True), 14)
    _prepare_training(policy, config.TrainConfig(checkpoint_activations=True))
    _, again = ours(policy, pack(items, 400, True), 14)
    assert relative(again, plain) <= 1e-6


@pytest.mark.slow
def test_compiled_layers(make_policy, groups, relative):
    """torch.compile with recomputation, batches of other lengths without compiling anew: the same gradient."""
    policy, items = make_policy(), groups.items(groups.ragged())
    batches = [pack(items, 10_000, True), pack(items, 400, False)]
    plain = [ours(policy, b, 14)[1] for b in batches]
    _prepare_training(policy, config.TrainConfig(compile=True, checkpoint_activations=True))
    for batch, expected in zip(batches, plain, strict=True):
        assert relative(ours(policy, batch, 14)[1], expected) <= 5e-6


def test_bfloat16_gap(make_policy, groups, gold, relative, figure):
    """bf16 matmuls, fp32 masters and epilogue: log-probs within 0.1 nats, mean bias within 0.01; reported."""
    policy, items = make_policy(), groups.items(groups.ragged())
    policy.matmul_dtype = torch.bfloat16
    logprob, gradients = ours(policy, pack(items, 10_000, True), 14)
    expected, exact = gold(policy.model, items, squared(14))
    differences = np.concatenate([logprob[key] - expected[key] for key in expected])
    figure("logprob_max", float(np.abs(differences).max()))
    figure("logprob_bias", float(differences.mean()))
    figure("gradient", relative(gradients, exact))
    assert 1e-4 < np.abs(differences).max() < 0.1
    assert abs(differences.mean()) < 0.01
    assert relative(gradients, exact) < 0.2


def test_score_is_what_training_sees(make_policy, groups):
    """score() gives training's log-probs, zero on tokens of tools, and nothing for a rollout without sampled tokens."""
    policy, made = make_policy(), groups.ragged(turns=True)
    found = score(policy, made, temperature=0.7, token_budget=400)
    logprob, _ = ours(policy, pack(groups.items(made), 400, True), 14, 0.7)
    for group in made:
        for r in group.rollouts:
            mask = r.loss_mask[r.prompt_length :] != 0
            assert found[r.key].shape == (r.response_tokens,)
            np.testing.assert_allclose(found[r.key][mask], logprob[r.key], atol=1e-6)
            assert not found[r.key][~mask].any()


def test_stock_attention_is_refused(make_policy, groups):
    """The silent trap: shared rows through stock sdpa, or ours without a plan, do not run."""
    policy = make_policy()
    (batch,) = pack(groups.items([groups.make(0, 8, [4, 4])]), 100, True)
    policy.model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match='uses attention "sdpa", which reads packed rows wrongly'):
        policy.hidden(batch)
    policy.model.set_attn_implementation(attention.NAME)
    with pytest.raises(RuntimeError, match="without a plan"):
        policy.model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_a_leak_is_noticed(make_policy, groups, gold, relative, monkeypatch):
    """The comparison can fail: a plan whose responses also read one another misses the gold gradient by far."""
    policy, items = make_policy(), groups.items(groups.ragged())
    real = attention._positions_and_owners
    monkeypatch.setattr(attention, "_positions_and_owners", lambda *a: (lambda p, o: (p, o * 0))(*real(*a)))
    _, gradients = ours(policy, pack(items, 10_000, True), 14)
    _, exact = gold(policy.model, items, squared(14))
    assert relative(gradients, exact) > 1e-3
