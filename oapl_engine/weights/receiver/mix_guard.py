"""A vLLM worker computes no token while its weights are a mix of two versions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def refusing_a_mix(execute_model: Callable[..., Any]) -> Callable[..., Any]:
    """execute_model of a worker, which raises RuntimeError where tokens are scheduled and its weights are incomplete.

    A paused server that is resumed in the middle of an update thus dies. It stands before the model, because a CUDA
    graph is replayed without a call of the model or its hooks. Steps without tokens, which follow an abort, pass.
    """
    if hasattr(execute_model, "refuses_a_mix"):
        return execute_model

    @functools.wraps(execute_model)
    def execute_complete_model(worker: Any, scheduler_output: Any) -> Any:
        update = getattr(worker.weight_transfer_engine, "update", None)  # another backend has none
        if update and scheduler_output.total_num_scheduled_tokens and update.state != "complete":
            raise RuntimeError("weights are incomplete: publish a complete version before generating")
        return execute_model(worker, scheduler_output)

    execute_complete_model.refuses_a_mix = True  # type: ignore[attr-defined]
    return execute_complete_model
