"""A model that loads its weights the way vLLM's models do, and the tensors of its trainer."""

import torch
from torch import nn

FEW, PADDED, HIDDEN = 10, 16, 8


class FusedModel(nn.Module):
    """Fused qkv, padded embedding, tied head: the trainer's names on one side, the engine's on the other."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(PADDED, HIDDEN, dtype=dtype))
        self.head = self.embed
        self.qkv = nn.Parameter(torch.zeros(3 * HIDDEN, HIDDEN, dtype=dtype))
        self.down = nn.Parameter(torch.zeros(HIDDEN, HIDDEN, dtype=dtype))
        self.norm = nn.Parameter(torch.zeros(HIDDEN, dtype=dtype))

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "embed":
                self.embed.data[:FEW].copy_(tensor)
                self.embed.data[FEW:].fill_(0)
            elif name in ("q", "k", "v"):
                self.qkv.data.narrow(0, "qkv".index(name) * HIDDEN, HIDDEN).copy_(tensor)
            elif name == "down":
                self.down.data.copy_(tensor.t())
            elif name == "norm":
                assert tensor.shape == self.norm.shape, f"{tensor.shape} != {self.norm.shape}"
                self.norm.data.copy_(tensor)


def trainer_tensors(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (FEW, HIDDEN), "q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN)}
    shapes |= {"down": (HIDDEN, HIDDEN), "norm": (HIDDEN,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
