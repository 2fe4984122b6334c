"""A worker extension that breaks the engine in the ways that publishing must notice. Loaded in the engine process."""

import os
from pathlib import Path

from oapl_engine.weights.receiver.extension import WeightReport


class Faulty(WeightReport):
    """At the start of an update: what the file named by OAPL_TEST_FAULT asks for."""

    def abandon_weight_update(self):
        super().abandon_weight_update()
        fault = Path(os.environ["OAPL_TEST_FAULT"])
        what = fault.read_text() if fault.exists() else ""
        model = self.model_runner.model
        update = self.weight_transfer_engine.update
        if what == "stale head":
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
        if what == "live head":
            import torch

            model.lm_head.cpu_linear = torch.nn.functional.linear
        if what == "lost scatter":
            source = next(
                s for ss in update.buckets.values() for s in ss if s.name.endswith("layers.1.mlp.up_proj.weight")
            )
            source.pairs = [(live.clone(), sent) for live, sent in source.pairs]
