"""Random groups of rollouts."""

import numpy as np

from oapl_engine.samples import Group, Prompt, Rollout, Span, make_rollout
from tests.support.models import VOCABULARY


def random_rollout(group, sample, prompt, response, rng, *, turns=False, finish="stop", reward=None, status="scored"):
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


def random_group(number, prompt_length, lengths, *, turns=False, rewards=None, finishes=None, seed=0):
    rng = np.random.default_rng([seed, number])
    prompt = rng.integers(3, VOCABULARY, prompt_length)
    rollouts = tuple(
        random_rollout(
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


def plain_group(name, status="scored", n=2, version=3, reward_detail=None):
    """Group "0.p{name}.0": a prompt of 4 tokens, sample i with i + 1 response tokens."""
    prompt = Prompt(f"p{name}", np.arange(4, dtype=np.int32), "sort", {"answer": "12"})
    rollouts = tuple(
        make_rollout(
            prompt,
            f"0.p{name}.0",
            i,
            np.arange(4, 4 + i + 1),
            -0.5,
            spans=(Span(version, 0, i + 1),),
            finish="stop",
            status=status,
            reward=1.0 if status == "scored" else None,
            reward_detail=reward_detail or {"why": "x"},
            finished_ns=2,
        )
        for i in range(n)
    )
    return Group(f"0.p{name}.0", prompt, rollouts, version)
