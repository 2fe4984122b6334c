"""Finds out by trying how a model's rows may be packed: no architecture is trusted by its name alone.

What is right are the log-probs of the model's own eager attention, the one that its modelling file spells out, one
sequence at a time. transformers' "sdpa" may leave out a step of it: it drops the soft-cap of Gemma-2's scores. A
packing mode is wrong where something besides attention reads across rows (linear attention, short convolutions,
ALiBi), or where attention is not what `oapl_packed` computes (masks of its own). Then the packed log-probs differ, and
the next mode is tried.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from oapl_engine.errors import ConfigError
from oapl_engine.samples import Prompt, Rollout, make_rollout
from oapl_engine.trainer import attention
from oapl_engine.trainer.packing import TrainGroup
from oapl_engine.trainer.packing_mode import PACKING_MODES, PackingMode, packing_rule
from oapl_engine.trainer.policy import Policy

log = logging.getLogger(__name__)
PROBE_WINDOW = 3  # of sliding windows during the probe, whose sequences are longer


def choose_packing_mode(policy: Policy) -> None:
    """Set the first of PACKING_MODES whose log-probs are those of the model's own eager attention, and an attention to
    go with it. The reason why better ones are wrong is logged. ConfigError if none has them.
    """
    network, matmul_dtype, kernel = policy.model, policy.matmul_dtype, policy.kernel
    # The comparison is one of mathematics: at the parameters' own precision, by a kernel that has it.
    policy.matmul_dtype, policy.kernel = next(network.parameters()).dtype, "sdpa"
    groups = probe_groups(policy.vocabulary)
    with _short_windows(network):
        own, one_by_one = _own_attention(policy, groups)
        reason = _known_reason(network)
        candidates = [(mode, attention.NAME) for mode in PACKING_MODES if mode.together and reason is None]
        for mode, implementation in (*candidates, (PACKING_MODES[-1], one_by_one)):
            policy.packing_mode = PackingMode(mode.share, mode.together, reason)
            network.set_attn_implementation(implementation)
            failure = _compare(policy, groups, own)
            if failure is None:
                break
            reason = reason or failure
        else:
            name = type(network).__name__
            raise ConfigError(f"{name}: log-probs differ from the model's own ({failure}); not supported")
    policy.matmul_dtype, policy.kernel = matmul_dtype, kernel
    if reason is not None:
        log.warning("prompts are not shared%s: %s", "" if policy.packing_mode.together else ", nor rows packed", reason)


def probe_groups(vocabulary: int) -> list[TrainGroup]:
    """Two groups of two short rollouts, enough for one to leak into another."""
    groups = []
    about: dict[str, Any] = {"spans": (), "finish": "stop", "status": "scored", "reward": 0.0}
    for g in range(2):
        draw = np.random.default_rng(g)
        probe = Prompt("probe", draw.integers(0, vocabulary, 4 + g).astype(np.int32), "probe")
        responses = [draw.integers(0, vocabulary, length) for length in (3, 5)]
        rollouts = tuple(make_rollout(probe, str(g), i, response, **about) for i, response in enumerate(responses))
        groups.append(TrainGroup(rollouts, np.zeros(2, np.float32)))
    return groups


@contextmanager
def _short_windows(network: PreTrainedModel) -> Iterator[None]:
    """Sliding windows of PROBE_WINDOW positions, so that a short probe reaches beyond them."""
    configs = {id(m.config): m.config for m in network.modules() if hasattr(m, "config")}
    places = [place for place in (*network.modules(), *configs.values()) if isinstance(_window(place), int)]
    windows = [place.sliding_window for place in places]
    try:
        for place in places:
            place.sliding_window = min(PROBE_WINDOW, place.sliding_window)
        yield
    finally:
        for place, window in zip(places, windows, strict=True):
            place.sliding_window = window


def _window(place: Any) -> Any:
    try:
        return getattr(place, "sliding_window", None)
    except RuntimeError:  # of a config whose layers have windows of their own, in configs of their own
        return None


def _own_attention(policy: Policy, groups: list[TrainGroup]) -> tuple[dict[str, Tensor], str]:
    """Log-probs by rollout key of eager attention, and the implementation for one sequence at a time: "sdpa", which
    needs less memory, where it agrees."""
    network, rollouts = policy.model, [r for group in groups for r in group.rollouts]

    def logprobs(implementation: str) -> dict[str, Tensor]:
        network.set_attn_implementation(implementation)
        return {r.key: unpacked_logprob(network, r, policy.device) for r in rollouts}

    name = type(network).__name__
    try:
        own = logprobs("eager")
    except Exception as error:
        raise ConfigError(f"{name}: its own forward pass failed: {type(error).__name__}: {error}") from error
    if not (network._supports_sdpa and network._can_set_attn_implementation()):
        return own, "eager"
    try:
        off = largest_difference(logprobs("sdpa"), own)
    except Exception as error:
        log.warning('%s: attention "sdpa" failed (%s): "eager" is used in its place', name, error)
        return own, "eager"
    if off <= _tolerance(policy):
        return own, "sdpa"
    log.warning(
        '%s: transformers\' attention "sdpa" is off by %.2g nats from "eager", which is right and is what is trained',
        name,
        off,
    )
    return own, "eager"


@torch.no_grad()
def unpacked_logprob(model: torch.nn.Module, rollout: Rollout, device: torch.device) -> Tensor:
    """Log-probs of the response [R] by the model's own attention and head, f32 or better."""
    tokens = torch.from_numpy(rollout.token_ids.astype(np.int64)).to(device)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, rollout.prompt_length - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, tokens[rollout.prompt_length :, None])[:, 0]


def _known_reason(network: PreTrainedModel) -> str | None:
    if not network._can_set_attn_implementation():
        return f"{type(network).__name__} does not take its attention from transformers' AttentionInterface"
    return packing_rule(network.config.get_text_config())


def _tolerance(policy: Policy) -> float:
    return 0.1 if policy.matmul_dtype == torch.bfloat16 else 1e-3


@torch.no_grad()
def _compare(policy: Policy, groups: list[TrainGroup], own: dict[str, Tensor]) -> str | None:
    """What is wrong with the policy's log-probs in its packing mode; None if nothing."""
    found: dict[str, Tensor] = {}
    try:
        for batch in policy.batches(groups, 1 << 20, True):
            lengths = np.diff(batch.cu_seqlens).tolist()
            found |= zip(batch.keys, policy.logprob(batch, 1.0).split(lengths), strict=True)
    except Exception as error:  # whatever a modelling file raises where it is not called as it expects
        return f"the packed forward pass failed: {type(error).__name__}: {error}"
    off = largest_difference(found, own)
    return None if off <= _tolerance(policy) else f"packed log-probs are off by {off:.2g} nats"


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of log-probs by rollout key, in nats; NaN if one is NaN."""
    return float(torch.cat([found[key] - value for key, value in expected.items()]).abs().max())
