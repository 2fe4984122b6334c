"""Loaded into vLLM by benchmarks/weights.py: a memcpy and a re-pack beside our scatter, and vLLM's own ways to new
weights."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from oapl_engine.weights.receiver.layer_check import LayerCheck
from oapl_engine.weights.receiver.vllm_plugin import WeightReport


class Timed(WeightReport):
    """WeightReport that, asked for checksums after an update, copies what it brought into memory of this process, and
    packs what it brought for vLLM's own CPU kernels."""

    def parameter_checksums(self) -> dict[str, Any]:
        """{"memcpy": seconds for as many bytes as the update had, from the same buckets; "repack": seconds to pack the
        linear layers and the head as vLLM does where a loaded weight is final (we keep them plain, so it is extra)}."""
        update = self.weight_transfer_engine.update
        return {"memcpy": min(self._memcpy(update) for _ in range(5)), "repack": self._repack(update.model)}

    @staticmethod
    def _repack(model: torch.nn.Module) -> float:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        weights = {layer.weight.data_ptr(): layer.weight for layer in LayerCheck(model).layers.values()}
        begin = time.perf_counter()
        for weight in weights.values():  # one packed copy at a time: memory for all of them is not the question
            layer = torch.nn.Module()
            layer.weight = weight
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        return time.perf_counter() - begin

    def _memcpy(self, update: Any) -> float:
        buffers = update.reader.buffers
        self.copied = getattr(self, "copied", None) or [torch.zeros_like(b) for b in buffers]
        begin = time.perf_counter()
        for bucket, slices in update.buckets.items():
            last = slices[-1].sent
            length = (last.storage_offset() + last.numel()) * last.element_size()
            self.copied[bucket % 2][:length].copy_(buffers[bucket % 2][:length])
        return time.perf_counter() - begin


class Stock:
    """vLLM's worker, as shipped: its layers packed, its layerwise reload from tensors that are in memory already."""

    model_runner: Any
    vllm_config: Any
    model_config: Any

    def layerwise_seconds(self, folder: str) -> float:
        from safetensors.torch import load_file
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        weights = {n: t.clone() for f in sorted(Path(folder).glob("*.safetensors")) for n, t in load_file(f).items()}
        model = self.model_runner.model
        begin = time.perf_counter()
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            model.load_weights(iter(weights.items()))
            finalize_layerwise_reload(model, self.model_config)
        return time.perf_counter() - begin


def main(folder: str, dtype: str, rounds: int) -> None:
    """Print {"reload from disk": seconds, "layerwise from memory": seconds}, medians after the first round, as JSON."""
    from vllm import LLM

    llm = LLM(
        folder,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=256,
        skip_tokenizer_init=True,
        worker_extension_cls="benchmarks._vllm_paths.Stock",
        kv_cache_memory_bytes=256 << 20,
    )
    found: dict[str, list[float]] = {"reload from disk": [], "layerwise from memory": []}
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        llm.collective_rpc("reload_weights")
        found["reload from disk"].append(time.perf_counter() - begin)
        found["layerwise from memory"].append(llm.collective_rpc("layerwise_seconds", args=(folder,))[0])
    print(json.dumps({name: statistics.median(seconds[1:]) for name, seconds in found.items()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
