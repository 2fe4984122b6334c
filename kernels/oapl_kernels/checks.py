"""Checks of arguments: every ValueError names the argument, its value and what is allowed."""

from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MASKS = (torch.bool, torch.uint8, *INTEGERS, *FLOATS)


def check_tensor(name: str, value: object, shape: tuple[int | None, ...], dtypes: tuple, device: torch.device) -> None:
    """value is a tensor of this shape (None: any size), one of the dtypes, on the device."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; allowed: a tensor")
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    if value.dim() != len(shape) or any(b is not None and a != b for a, b in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{name} has shape {list(value.shape)}; allowed: {wanted}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; allowed: {allowed}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; allowed: {device}, where the other arguments are")


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_tokens: int | None,
    same_dtype: bool = True,
) -> None:
    """The arguments of a vocabulary head; same_dtype=False under autocast, which casts hidden and weight."""
    check_tensor("hidden", hidden, (None, None), FLOATS, getattr(hidden, "device", None))
    check_tensor("weight", weight, (None, hidden.shape[1]), FLOATS, hidden.device)
    if same_dtype and weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight has dtype {weight.dtype} but hidden has {hidden.dtype}; allowed: the same dtype, or torch.autocast"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has 0 rows; allowed: a vocabulary of at least 1")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), FLOATS, hidden.device)
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; allowed: a finite number > 0")
    if chunk_tokens is not None and not (isinstance(chunk_tokens, int) and chunk_tokens >= 1):
        raise ValueError(f"chunk_tokens is {chunk_tokens}; allowed: an integer >= 1, or None for the default")


def check_target(target: Tensor, tokens: int, vocabulary: int, ignore_index: int, device: torch.device) -> Tensor:
    """target [T] with ids in [0, vocabulary) or ignore_index -> bool [T], true where it is not ignored."""
    check_tensor("target", target, (tokens,), INTEGERS, device)
    counted = target != ignore_index
    wrong = counted & ((target < 0) | (target >= vocabulary))
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(
            f"target[{position}] is {int(target[position])}; "
            f"allowed: 0 to {vocabulary - 1}, or ignore_index {ignore_index}"
        )
    return counted


def check_offsets(name: str, offsets: Tensor, total: int, device: torch.device, least: int = 1) -> list[int]:
    """offsets [N+1]: 0, each at least `least` more than the one before, ending at total; returned as a list."""
    check_tensor(name, offsets, (None,), INTEGERS, device)
    values = offsets.tolist()
    if not values or values[0] != 0 or values[-1] != total:
        ends = f"{values[0]} to {values[-1]}" if values else "nothing"
        raise ValueError(f"{name} runs from {ends}; allowed: from 0 to {total}, the length of what it divides")
    for index, (before, after) in enumerate(pairwise(values)):
        if after < before + least:
            how = "strictly increasing" if least else "never decreasing"
            raise ValueError(f"{name}[{index + 1}] is {after} after {before}; allowed: {how} offsets")
    return values


def check_logprob(name: str, value: Tensor | None, tokens: int, trained: Tensor, device: torch.device) -> None:
    """value [T] (None passes) is finite wherever a token is trained."""
    if value is None:
        return
    check_tensor(name, value, (tokens,), FLOATS, device)
    wrong = ~torch.isfinite(value) & trained
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}[{position}] is {float(value[position])}; allowed: finite numbers where mask is nonzero"
        )


def check_group(reward: Tensor, cu_groups: Tensor, beta1: float) -> None:
    """The arguments of group_value and group_advantage."""
    check_tensor("reward", reward, (None,), FLOATS, getattr(reward, "device", None))
    check_offsets("cu_groups", cu_groups, len(reward), reward.device)
    if not beta1 > 0:
        raise ValueError(f"beta1 is {beta1}; allowed: a number > 0, inf for the group mean")
    check_logprob("reward", reward, len(reward), torch.ones_like(reward, dtype=torch.bool), reward.device)
