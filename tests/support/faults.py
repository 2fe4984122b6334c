"""A worker extension that breaks the engine in the ways that publishing must notice. Loaded in the engine process."""

import os
from pathlib import Path

from oapl_engine.weights.receiver.vllm_plugin import WeightReport


def fault():
    """What the file named by OAPL_TEST_FAULT asks for."""
    path = Path(os.environ["OAPL_TEST_FAULT"])
    return path.read_text(encoding="utf-8") if path.exists() else ""


def keep_caches_when_asked():
    """vLLM's two ways to clear its caches, and the fault "prefix cache kept" in them."""
    from vllm.v1.engine.async_llm import AsyncLLM

    pause = AsyncLLM.pause_generation

    async def faulty(self, *, mode="abort", clear_cache=True):
        await pause(self, mode=mode, clear_cache=clear_cache and fault() != "prefix cache kept")

    reset = AsyncLLM.reset_prefix_cache

    async def lazy(self, *arguments):
        return True if fault() == "prefix cache kept" else await reset(self, *arguments)

    AsyncLLM.pause_generation, AsyncLLM.reset_prefix_cache = faulty, lazy


keep_caches_when_asked()


class Faulty(WeightReport):
    """At the start of an update: what the file named by OAPL_TEST_FAULT asks for."""

    def abandon_weight_update(self):
        super().abandon_weight_update()
        what = fault()
        model = self.model_runner.model
        update = self.weight_transfer_engine.update
        if what == "stale head":
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
        if what == "live head":
            import torch

            model.lm_head.cpu_linear = torch.nn.functional.linear
        if what == "lost scatter":
            slices = [part for bucket in update.buckets.values() for part in bucket]
            lost = next(part for part in slices if part.name.endswith("layers.1.mlp.up_proj.weight"))
            lost.copies = [(live.clone(), sent) for live, sent in lost.copies]
