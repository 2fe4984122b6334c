"""A model that loads weights as vLLM's models do, in plain torch: fused projections, a padded vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

# Where a layer's tensors go: the parameter's place in the layer, and the part of its rows.
PLACES = {
    "q": (0, 0),
    "k": (0, 1),
    "v": (0, 2),
    "o": (1, 0),
    "gate": (2, 0),
    "up": (2, 1),
    "down": (3, 0),
    "norm": (4, 0),
}
PARAMETERS = 5  # of a layer


class Size(NamedTuple):
    """Of a decoder: layers, hidden, intermediate, vocabulary."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


def named_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """The trainer's tensors, separate projections and no padding."""
    hidden, wide = size.hidden, size.intermediate
    layer: dict[str, tuple[int, ...]] = dict.fromkeys("qkvo", (hidden, hidden))
    layer |= {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide), "norm": (hidden,)}
    layers = {f"{i}.{name}": shape for i in range(size.layers) for name, shape in layer.items()}
    return {"embed": (size.vocabulary, hidden), **layers}


class PlainModel(torch.nn.Module):
    """The engine's side, bfloat16: zeros until load_weights."""

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__()
        hidden, wide = size.hidden, size.intermediate
        padded = -(-size.vocabulary // 64) * 64
        layer = [(3 * hidden, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide), (hidden,)]

        def parameter(shape: tuple[int, ...]) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device), requires_grad=False)

        self.vocabulary = size.vocabulary
        self.embed = parameter((padded, hidden))
        self.layers = torch.nn.ParameterList(parameter(shape) for _ in range(size.layers) for shape in layer)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "embed":
                self.embed.data[: self.vocabulary].copy_(tensor)
                self.embed.data[self.vocabulary :].fill_(0)
                continue
            layer, _, part = name.partition(".")
            place, rows = PLACES[part]
            fused = self.layers[PARAMETERS * int(layer) + place].data
            fused.narrow(0, rows * len(tensor), len(tensor)).copy_(tensor)
