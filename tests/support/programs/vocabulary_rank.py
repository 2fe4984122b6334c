"""One rank of test_vocabulary.py: its part of a sharded head against the whole one. Arguments: rank, world, file."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from oapl_kernels import fused_policy_loss, linear_logprob
from oapl_kernels.objectives import grpo, oapl

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.support.fresh_memory import nan_in_fresh_memory
from tests.support.head_reference import make_case, relative_error

RANK, WORLD, FILE = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
LIMIT = {torch.float64: 1e-12, torch.float32: 3e-6}


def run(case, rows, group, backend):
    hidden, weight, bias = (t.clone().requires_grad_() for t in (case.hidden, case.weight[rows], case.bias[rows]))
    options = {"bias": bias, "chunk_tokens": 16, "backend": backend, "process_group": group}
    options |= {"temperature": case.temperature, "softcap": case.softcap}
    result = fused_policy_loss(
        hidden, weight, case.target, case.cu_seqlens, case.objective, case.inputs,
        normalizer=3.0, entropy_coefficient=case.entropy_coefficient, **options,
    )  # fmt: skip
    result.loss.backward()
    fused = [result.loss.detach(), result.logprob, result.entropy, hidden.grad, weight.grad, bias.grad]
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight[rows].clone().requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, case.target, return_entropy=True, **options)
    (logprob.sum() + entropy.square().sum()).backward()
    return [*fused, logprob.detach(), entropy.detach(), hidden.grad, weight.grad]


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{FILE}", rank=RANK, world_size=WORLD)
    cut = [0, 101, 257]  # shards of different sizes
    mine = slice(cut[RANK], cut[RANK + 1])
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "auto")):
        for objective, options in ((oapl(0.05), {}), (grpo(), {"softcap": 4.0, "entropy_coefficient": 0.02})):
            case = make_case(objective, [3, 71, 8, 2], 0, dtype, **options)
            whole = run(case, slice(None), None, backend)
            shard = run(case, mine, dist.group.WORLD, backend)
            for index, (found, exact) in enumerate(zip(shard, whole, strict=True)):
                exact = exact[mine] if index in (4, 5, 9) else exact
                error = relative_error(found, exact.double())
                assert error < LIMIT[dtype], f"{dtype} {backend} {objective.name} result {index}: {error:.1e}"
            mean = shard[0].clone()
            dist.broadcast(mean, 0)
            assert torch.equal(mean, shard[0]), "the loss differs between ranks"
    dist.destroy_process_group()  # else gloo's threads may abort the process while the interpreter ends
    print(f"rank {RANK} agrees")


if __name__ == "__main__":
    with nan_in_fresh_memory():
        main()
