"""In which packing modes a model computes exactly, found out by trying: no architecture is trusted by its name alone.

A mode is wrong where something besides attention reads across rows (linear attention, short convolutions, ALiBi),
or where attention is not what `oapl_packed` computes (sinks, masks of its own). Then the log-probs of a packed probe
differ from the model's own, sequence by sequence, and the next mode is tried.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oapl_engine.samples import Prompt, Rollout, make_rollout
from oapl_engine.trainer.packing import TrainGroup


@dataclass(frozen=True)
class PackingMode:
    """How sequences may share a batch.

    share:     a group's prompt is computed once
    together:  several sequences are in one batch
    reason:    why not, for the log
    """

    share: bool = True
    together: bool = True
    reason: str | None = None


PACKING_MODES = (PackingMode(), PackingMode(share=False), PackingMode(share=False, together=False))  # best first


def packing_rule(config: object) -> str | None:
    """What the probe is too short to see, in a transformers config; None if nothing."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
        return f"{rope['rope_type']} RoPE depends on the longest position of the batch"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"{sorted(other)[0]} layers read other rows than attention does"
    if getattr(config, "alibi", False):
        return "ALiBi depends on the distance between rows"
    return None


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


@torch.no_grad()
def unpacked_logprob(model: torch.nn.Module, rollout: Rollout, device: torch.device) -> Tensor:
    """Log-probs of the response [R] by the model's own attention and head, f32 or better."""
    tokens = torch.from_numpy(rollout.token_ids.astype(np.int64)).to(device)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, rollout.prompt_length - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, tokens[rollout.prompt_length :, None])[:, 0]
