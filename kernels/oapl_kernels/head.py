"""The vocabulary head on one chunk of tokens: logits, statistics, gradient. Used by both public operations."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import backend as backends
from .chunks import default_chunk_tokens
from .compiler import operation, return_nothing
from .epilogue import cast_in_place
from .matmul import WeightGradient, accumulation_dtype, multiplies_natively, project
from .vocabulary import Vocabulary


class HeadOptions(NamedTuple):
    """What the public operations say about the head, in types that a custom op takes."""

    temperature: float
    softcap: float | None
    chunk_tokens: int | None
    backend: str
    group: str | None


@operation(return_nothing, mutates=("out",))
def epilogue_statistics(
    logits: Tensor, target: Tensor, out: Tensor, temperature: float, softcap: float | None, backend: str
) -> None:
    """`epilogue.statistics` of a backend."""
    backends.epilogue(backend).statistics(logits, target, temperature, softcap, out)


@operation(return_nothing, mutates=("logits",))
def epilogue_gradient(
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    coefficient: Tensor,
    entropy_coefficient: Tensor | None,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
    backend: str,
) -> None:
    """`epilogue.gradient` of a backend: `cast_in_place(logits, dtype)` is then the gradient."""
    epilogue = backends.epilogue(backend)
    epilogue.gradient(logits, target, statistics, coefficient, entropy_coefficient, temperature, softcap, dtype)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """hidden's dtype, or autocast's where autocast is on (float64 is left alone, as torch does)."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


class Head:
    """weight [V, D], bias [V] and one preallocated chunk of logits [chunk_tokens, V]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: HeadOptions, vocabulary: Vocabulary, tokens: int):
        self.weight, self.options, self.vocabulary = weight, options, vocabulary
        self.dtype = accumulation_dtype(weight.dtype)
        self.gradient_dtype = weight.dtype if multiplies_natively(weight.dtype, weight.device.type) else self.dtype
        self.bias = None if bias is None else bias.to(self.dtype)
        self.chunk_tokens = options.chunk_tokens or default_chunk_tokens(len(weight), weight.device)
        self._backend = backends.choose(options.backend, weight.device, weight.dtype)
        self.rows = min(self.chunk_tokens, tokens)
        self._logits = self.new(self.rows, len(weight))
        self._statistics = self.new(4, self.rows)

    def new(self, *shape: int) -> Tensor:
        """Uninitialised memory for sums: fp32, fp64 for fp64 weights."""
        return torch.empty(*shape, dtype=self.dtype, device=self.weight.device)

    def hidden_gradient(self, hidden: Tensor) -> Tensor:
        """Uninitialised memory for the gradient of hidden [T, D]. fp16 cannot hold gradients not scaled yet."""
        dtype = self.dtype if hidden.dtype == torch.float16 else hidden.dtype
        return torch.empty(*hidden.shape, dtype=dtype, device=hidden.device)

    def weight_gradient(self, weight: bool, bias: bool) -> WeightGradient:
        """Sums for the gradients of weight and bias, of those that are wanted."""
        return WeightGradient(
            self.new(*self.weight.shape) if weight else None, self.new(len(self.weight)) if bias else None
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [t, D] -> logits [t, V], valid until the next chunk."""
        out = self._logits[: len(hidden)]
        project(hidden, self.weight, out)
        return out if self.bias is None else out.add_(self.bias)

    def statistics(self, logits: Tensor, target: Tensor) -> Tensor:
        """[4, t]: log-prob of the target, entropy, max and ln sum exp(x - max) of logits [t, V]; valid until
        the next chunk. target -1: not in this shard."""
        out = self._statistics[:, : len(logits)]
        epilogue_statistics(logits, target, out, self.options.temperature, self.options.softcap, self._backend)
        return self.vocabulary.combine(out, target)

    def score(self, hidden: Tensor, target: Tensor) -> Tensor:
        """`statistics` of hidden [t, D]; valid until the next chunk. Without logits in memory where that is faster:
        half precision in Triton (fp32 products need the library's)."""
        if self._backend != "triton" or self.weight.dtype.itemsize > 2:
            return self.statistics(self.logits(hidden), target)
        from .scoring_triton import score

        options = self.options
        out = score(hidden, self.weight, self.bias, target, options.temperature, options.softcap)
        return self.vocabulary.combine(out, target)

    def gradient(
        self, logits: Tensor, target: Tensor, stats: Tensor, coefficient: Tensor, entropy_coefficient: Tensor | None
    ) -> Tensor:
        """d loss / d logits [t, V] in gradient_dtype, over the logits; coefficients [t] are the loss's derivatives
        by log-prob and by entropy."""
        epilogue_gradient(
            logits,
            target,
            stats,
            coefficient,
            entropy_coefficient,
            self.options.temperature,
            self.options.softcap,
            self.gradient_dtype,
            self._backend,
        )
        return cast_in_place(logits, self.gradient_dtype)
