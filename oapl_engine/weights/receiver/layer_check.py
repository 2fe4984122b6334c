"""Proof that layers compute with the bytes in place: either a layer is torch's product with its weight, by identity of
the function that it calls, or its answer to fixed inputs must change with its weight.

vLLM's CPU kernels work on packed copies of weights, and a copy that is not renewed gives old answers without an error
(vLLM 0.32: the head of a tied model after a reload). Checksums of the parameter cannot see that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ROWS = 4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the largest answer: kernels round
MOVED = 32  # entries of the plain product; an answer that follows the weight cannot stay the same bit for bit then


class LayerCheck:
    """Unquantised linear layers and heads of a model: those that are plain, and the answers of the others to fixed
    inputs, remembered between versions."""

    def __init__(self, model: torch.nn.Module) -> None:
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        kinds = (LinearBase, VocabParallelEmbedding)
        modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, kinds)}
        self.layers = {
            n: m for n, m in modules.items() if getattr(m, "weight", None) is not None and m.weight.ndim == 2
        }
        self.answers = {name: self._ask(layer) for name, layer in self.layers.items() if not self._plain(layer)}

    def stale(self) -> str | None:
        """The first layer that does not compute with its weight: it was plain and is not any more; or its answer is far
        from the plain product; or that moved and the answer is the same bit for bit, which small updates need."""
        for name, layer in self.layers.items():
            if name not in self.answers:
                if not self._plain(layer):
                    return f"{name}.weight"
                continue
            (answer, plain), (answer_before, plain_before) = self._ask(layer), self.answers[name]
            self.answers[name] = answer, plain
            far = (answer - plain).abs().max() > TOLERANCE[plain.dtype] * plain.abs().max()
            moved = int((plain != plain_before).sum()) >= MOVED
            if far or (moved and torch.equal(answer, answer_before)):
                return f"{name}.weight"
        return None

    @staticmethod
    def _plain(layer: torch.nn.Module) -> bool:
        """Whether vLLM's CPU layer calls torch's own product (see cpu_layers.py)."""
        return getattr(layer, "cpu_linear", None) is F.linear

    def _ask(self, layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer computes, and the plain product with its weight."""
        inputs = self._inputs(layer)
        with torch.inference_mode():
            return layer.quant_method.apply(layer, inputs).clone(), F.linear(inputs, layer.weight)

    @staticmethod
    def _inputs(layer: torch.nn.Module) -> torch.Tensor:
        generator = torch.Generator().manual_seed(layer.weight.shape[1])
        inputs = torch.randn(ROWS, layer.weight.shape[1], generator=generator)
        return inputs.to(layer.weight.dtype).to(layer.weight.device)
