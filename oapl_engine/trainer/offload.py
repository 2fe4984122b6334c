"""The trainer's state between its device and host memory: in phased mode it takes turns there with the engine.

Master weights, buffers and the optimizer's moments move; gradients are zero between steps, so they are freed instead.
"""

import torch
from torch import Tensor

from oapl_engine.trainer.policy import Policy


def move_trainer(policy: Policy, optimizer: torch.optim.Optimizer | None, device: torch.device) -> int:
    """Move all of it to `device`, where the policy then computes; returns the bytes that moved, 0 if it is there.

    optimizer: None for a policy that is not trained
    Parameters keep their identity (optimizer, tied weights, compiled layers).
    """
    if policy.device == device:
        return 0
    moved = 0
    for tensor in (*policy.model.parameters(), *policy.model.buffers()):
        tensor.grad = None
        tensor.data = move_tensor(tensor.data, device)
        moved += tensor.nbytes
    for state in optimizer.state.values() if optimizer else ():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():  # step counts are scalars: they stay
                state[name] = move_tensor(value, device)
                moved += value.nbytes
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
        torch.cuda.empty_cache()  # else the engine could not map what we no longer use
    policy.device = device
    return moved


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. All of a trainer's state moves through here."""
    return tensor.to(device)
