"""One GPU, no vLLM, torch >= 2.11: proves and measures what a machine without a GPU cannot.

A runnable file for a machine without a network, see gpu_check.sh; the stages are in benchmarks/_gpu. Each writes JSON
rows, also to $OUT/gpu_check.jsonl; what fails is a row with "error", and the next stage runs. DRY=1: small, on CPU.

    PYTHONPATH=kernels:. python benchmarks/gpu_check.py STAGE…      (in the root of the repository)
"""

import importlib
import sys
import time
import traceback

STAGES = {
    "kernels": "kernels.check_kernels",
    "weights": "weights.check_publish",
    "nccl": "weights.check_broadcast",
    "trainer": "trainer.check_trainer",
    "speed": "kernels.measure_speed",
}


def main(argv: list[str]) -> int:
    """Run stages, all by default. 0; 1 where one failed; 2 without a GPU, or for a name that is not a stage."""
    unknown = [name for name in argv if name not in STAGES]
    if unknown:
        print(f"error: unknown stage {unknown[0]}; there are: {', '.join(STAGES)}", file=sys.stderr)
        return 2
    import torch

    from benchmarks._gpu.report import DRY, write_row

    if not DRY and not torch.cuda.is_available():
        print("error: no CUDA device here; DRY=1 runs the stages small, on CPU", file=sys.stderr)
        return 2
    code = 0
    for name in argv or STAGES:
        begin = time.perf_counter()
        try:
            module, _, function = STAGES[name].partition(".")
            getattr(importlib.import_module(f"benchmarks._gpu.{module}"), function)()
        except Exception:
            write_row(name, error=traceback.format_exc()[-1500:])
            code = 1
        write_row(f"{name} done", seconds=time.perf_counter() - begin)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
