"""Tiny random models, random groups, and the gold for comparison: one sequence at a time in plain torch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from oapl_engine.samples import Group, Prompt, Rollout, Span
from oapl_engine.trainer.loading import choose_packing_mode
from oapl_engine.trainer.packing import TrainGroup
from oapl_engine.trainer.policy import Policy

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama_tied": lambda: LlamaConfig(tie_word_embeddings=True, **SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(head_dim=8, **SIZES),
    # both softcaps, and a window shorter than the sequences
    "gemma2": lambda: Gemma2Config(head_dim=8, sliding_window=9, **SIZES),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices: waking a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_network(name, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(CONFIGS[name]())
        for parameter in network.parameters():
            # Larger than the usual 0.02: log-probs far from uniform, gradients everywhere.
            parameter.data.normal_(0, 0.1) if parameter.dim() > 1 else parameter.data.normal_(1, 0.1)
    network.tie_weights()
    return network.to(dtype)


@pytest.fixture
def make_policy():
    """make_policy(name, dtype): a policy on the CPU around a tiny random model."""

    def make(name="llama", dtype=torch.float32):
        policy = Policy(make_network(name, dtype).eval(), None, torch.device("cpu"), dtype)
        choose_packing_mode(policy)
        return policy

    return make


@pytest.fixture
def model_folder(tmp_path):
    """A folder in Hugging Face layout: tiny Llama with a word-level tokenizer."""

    def make(name="llama", words=60):
        folder = tmp_path / f"model_{name}"
        make_network(name).save_pretrained(folder)
        vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(words)}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        tokenizer.save_pretrained(folder)
        return folder

    return make


def make_rollout(group, sample, prompt, response, rng, *, turns=False, finish="stop", reward=None, status="scored"):
    """turns: the middle third of the response was written by a tool, so it is not scored."""
    tokens = np.concatenate([prompt, response]).astype(np.int32)
    mask = (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)
    if turns:
        third = len(response) // 3
        mask[len(prompt) + third : len(prompt) + 2 * third] = 0
    behavior = np.where(mask, rng.uniform(-6, -3, len(tokens)), 0).astype(np.float32)
    return Rollout(
        key=f"{group}.{sample}",
        prompt_id=group.split(".")[1],
        group=group,
        sample=sample,
        task="t",
        token_ids=tokens,
        prompt_length=len(prompt),
        loss_mask=mask,
        behavior_logprob=behavior,
        spans=(Span(0, 0, len(response)),),
        finish=finish,
        status=status,
        reward=(float(rng.integers(0, 2)) if reward is None else reward) if status == "scored" else None,
    )


def make_group(number, prompt_length, lengths, *, turns=False, rewards=None, finishes=None, seed=0):
    rng = np.random.default_rng([seed, number])
    prompt = rng.integers(3, VOCABULARY, prompt_length)
    rollouts = tuple(
        make_rollout(
            f"0.p{number}.0",
            i,
            prompt,
            rng.integers(3, VOCABULARY, length),
            rng,
            turns=turns,
            reward=None if rewards is None else rewards[i],
            finish="stop" if finishes is None else finishes[i],
        )
        for i, length in enumerate(lengths)
    )
    return Group(f"0.p{number}.0", Prompt(f"p{number}", prompt.astype(np.int32), "t"), rollouts, 0)


@pytest.fixture
def groups():
    """groups(...) of make_group; ragged() a fixed ragged set with several turns, a one-token prompt and response."""
    ragged = [(1, 37, [5, 1, 12, 8]), (2, 64, [30, 17, 1, 6]), (3, 1, [7, 2, 1, 19]), (4, 200, [40, 90])]

    def items(made):
        rng = np.random.default_rng(7)
        return [TrainGroup(g.rollouts, rng.normal(size=len(g.rollouts)).astype(np.float32)) for g in made]

    def make_ragged(turns=False):
        return [make_group(*spec, turns=turns) for spec in ragged]

    return SimpleNamespace(make=make_group, ragged=make_ragged, items=items, rollout=make_rollout)


@pytest.fixture
def gold():
    """gold(network, items, loss, temperature): log-probs by key and gradients by name, one sequence at a time.

    loss(log-ratio sum, advantage) of one sequence; sdpa attention; nothing of ours is used.
    """

    def compute(network, items, loss, temperature=1.0):
        network.set_attn_implementation("eager" if "Gemma" in type(network).__name__ else "sdpa")
        network.zero_grad(set_to_none=True)
        logprobs = {}
        for item in items:
            for rollout, advantage in zip(item.rollouts, item.advantage, strict=True):
                tokens = torch.from_numpy(rollout.token_ids.astype(np.int64))
                logits = network(input_ids=tokens[None], use_cache=False).logits[0, :-1] / temperature
                values = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
                values = values[torch.from_numpy(rollout.loss_mask[1:] != 0)]
                behavior = torch.from_numpy(rollout.behavior_logprob[rollout.loss_mask != 0])
                loss((values - behavior).sum(), float(advantage)).backward()
                logprobs[rollout.key] = values.detach().numpy()
        gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        network.zero_grad(set_to_none=True)
        network.set_attn_implementation("oapl_packed")
        return logprobs, gradients

    return compute


@pytest.fixture
def relative():
    """relative(a, b): |a - b| / |b| over all gradients together, in float64."""

    def compute(a, b):
        assert a.keys() == b.keys()
        difference = sum(float((a[n].double() - b[n].double()).square().sum()) for n in b)
        return (difference / sum(float(b[n].double().square().sum()) for n in b)) ** 0.5

    return compute
