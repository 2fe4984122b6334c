"""Keeps parameters live on CPU, where vLLM would pack linear layers, embeddings and experts and drop the originals.

Installed once per process; acts only while a model is loaded whose config selects our backend. On CUDA the unquantised
parameters are live by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def keep_parameters_live() -> None:
    """Replace the packing steps (see vLLM's dispatch_cpu_unquantized_gemm) for engines that select our backend."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    _replace(UnquantizedLinearMethod, _plain_linear)
    _replace(UnquantizedEmbeddingMethod, _plain_linear)
    _replace(CPUUnquantizedExperts, _plain_experts)


def selected() -> bool:
    """Whether the engine that is being built takes weights through us."""
    from vllm.config import get_current_vllm_config

    from oapl_engine.weights.receiver import BACKEND

    config = get_current_vllm_config().weight_transfer_config
    return config is not None and config.backend == BACKEND


def _replace(kind: type, ours: Any) -> None:
    theirs = kind.process_weights_after_loading  # type: ignore[attr-defined]

    def process_weights_after_loading(self: Any, layer: torch.nn.Module) -> None:
        (ours if selected() else theirs)(self, layer)

    kind.process_weights_after_loading = process_weights_after_loading  # type: ignore[attr-defined]


def _plain_linear(method: Any, layer: torch.nn.Module) -> None:
    layer.cpu_linear = F.linear  # type: ignore[assignment]


def _plain_experts(method: Any, layer: torch.nn.Module) -> None:
    method._use_zentorch = False
    method.apply = _apply_experts


def _apply_experts(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Any,
    *_: Any,
    apply_router_weight_on_input: bool = False,
    expert_map: Any = None,
    **__: Any,
) -> None:
    """output [T, D] = sum over chosen experts of weight · w2[e] (silu(gate) · up), gate and up from w1[e] [2I, D]."""
    result = torch.zeros_like(output)
    for expert in topk_ids.unique().tolist():
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(hidden_states[rows], w1[expert]).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, w2[expert])
        if not apply_router_weight_on_input:
            out = out * topk_weights[rows, slots].unsqueeze(-1).to(out.dtype)
        result.index_add_(0, rows, out.to(result.dtype))
    output.copy_(result)
