"""Random groups, policies around tiny models, and the gold for comparison: one sequence at a time in plain torch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oapl_engine.trainer.packing import TrainGroup
from oapl_engine.trainer.packing_probe import choose_packing_mode
from oapl_engine.trainer.policy import Policy
from tests.support.fresh_memory import nan_in_fresh_memory
from tests.support.models import make_network
from tests.support.rollouts import random_group, random_rollout


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices: waking a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nan_in_memory():
    """A read before a write shows in the results."""
    with nan_in_fresh_memory():
        yield


@pytest.fixture
def make_policy():
    """make_policy(name, dtype): a policy on the CPU around a tiny random model."""

    def make(name="llama", dtype=torch.float32):
        policy = Policy(make_network(name, dtype).eval(), None, torch.device("cpu"), dtype)
        choose_packing_mode(policy)
        return policy

    return make


@pytest.fixture
def groups():
    """groups(...) of random_group; ragged() a fixed ragged set with several turns, a one-token prompt and response."""
    ragged = [(1, 37, [5, 1, 12, 8]), (2, 64, [30, 17, 1, 6]), (3, 1, [7, 2, 1, 19]), (4, 200, [40, 90])]

    def items(made):
        rng = np.random.default_rng(7)
        return [TrainGroup(g.rollouts, rng.normal(size=len(g.rollouts)).astype(np.float32)) for g in made]

    def make_ragged(turns=False):
        return [random_group(*spec, turns=turns) for spec in ragged]

    return SimpleNamespace(make=random_group, ragged=make_ragged, items=items, rollout=random_rollout)


@pytest.fixture
def gold():
    """gold(network, items, loss, temperature): log-probs by key and gradients by name, one sequence at a time.

    loss(log-ratio sum, advantage) of one sequence; its own attention; nothing of ours is used.
    """

    def compute(network, items, loss, temperature=1.0):
        # Eager attention takes its softmax in float32.
        network.set_attn_implementation("sdpa" if network.dtype == torch.float64 else "eager")
        network.zero_grad(set_to_none=True)
        logprobs = {}
        for item in items:
            for rollout, advantage in zip(item.rollouts, item.advantage, strict=True):
                tokens = torch.from_numpy(rollout.token_ids.astype(np.int64))
                logits = network(input_ids=tokens[None], use_cache=False).logits[0, :-1] / temperature
                values = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
                values = values[torch.from_numpy(rollout.loss_mask[1:] != 0)]
                behavior = torch.from_numpy(rollout.behavior_logprob[rollout.loss_mask != 0])
                loss((values - behavior).sum(), float(advantage)).backward()
                logprobs[rollout.key] = values.detach().numpy()
        gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        network.zero_grad(set_to_none=True)
        network.set_attn_implementation("oapl_packed")
        return logprobs, gradients

    return compute


@pytest.fixture
def relative():
    """relative(a, b): |a - b| / |b| over all gradients together, in float64."""

    def compute(a, b):
        assert a.keys() == b.keys()
        difference = sum(float((a[n].double() - b[n].double()).square().sum()) for n in b)
        return (difference / sum(float(b[n].double().square().sum()) for n in b)) ** 0.5

    return compute
