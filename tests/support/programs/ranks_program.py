"""Run by torchrun in test_ranks.py: step-1 gradients and ten updates of the micro model, on this many ranks.

python -m tests.support.programs.ranks_program MODEL ROLLOUTS OUT [GROUPS] [no-reduction]
"""

import sys

import torch
from safetensors.torch import save_file

from oapl_engine import config
from oapl_engine.distributed import Ranks, join_ranks
from oapl_engine.rollout_log.interchange import Limits, read_rollouts
from oapl_engine.trainer.loading import load_policy
from oapl_engine.trainer.objective import make_objective
from oapl_engine.trainer.optimizer import make_optimizer
from oapl_engine.trainer.packing import share_groups
from oapl_engine.trainer.selection import exchange_groups, select_rollouts
from oapl_engine.trainer.step import accumulate_gradients, sum_gradients, train_step

STEPS = 10


def main(model, rollouts, out, groups="8", *switches):
    torch.set_num_threads(1)
    ranks = join_ranks()
    if "no-reduction" in switches:
        Ranks.sum_ = lambda self, tensors: None
    train = config.TrainConfig(precision="float32")
    policy = load_policy(config.ModelConfig(path=model), train)
    start = {name: p.detach().clone() for name, p in policy.trainable().items()}
    section = config.ObjectiveConfig(beta1=float("inf"), beta2=0.1)
    file = read_rollouts(rollouts, Limits(32, 8, (2,), 1), policy.tokenizer).groups
    file = [g for g in file if len({r.reward for r in g.scored()}) > 1]  # each trains something
    # A rank holds every world-th group in its own log, as the learner of that rank would.
    own = [g for i, g in enumerate(file) if i % ranks.world == ranks.rank]
    optimizer = make_optimizer(policy, config.OptimizerConfig(learning_rate=3e-4))
    found = {}
    for step in range(STEPS):
        chosen = [g.id for g in file[step * int(groups) % 32 :][: int(groups)]]
        data = select_rollouts(exchange_groups(ranks, [g for g in own if g.id in chosen], chosen), section, 8)
        share = share_groups(data.groups, ranks)
        batches = policy.batches(share, 256, True)
        objective = make_objective(section, data.beta2)
        if step == 0:
            accumulate_gradients(policy, batches, objective, normalizer=float(len(data.keys)))
            sum_gradients(policy, ranks)
            found |= {f"gradient/{name}": p.grad.clone() for name, p in policy.trainable().items()}
            tokens = [sum(len(r.token_ids) for r in item.rollouts) for item in share]
            found["share"] = torch.tensor([len(batches), sum(tokens)])
            optimizer.zero_grad(set_to_none=False)
        result = train_step(
            policy, optimizer, batches, objective, learning_rate=3e-4, normalizer=float(len(data.keys)), clip_norm=1.0,
            ranks=ranks,
        )  # fmt: skip
    metrics = {k: v for k, v in result.metrics.items() if v is not None}
    found["metrics"] = torch.tensor([metrics[k] for k in sorted(metrics)], dtype=torch.float64)
    found |= {f"update/{name}": p.detach() - start[name] for name, p in policy.trainable().items()}
    save_file(found, f"{out}.{ranks.rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
