"""The examples of docs/extending.md work as a user's own modules: no file of ours names them."""

import importlib
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from oapl_kernels import PolicyInputs, fused_policy_loss

from oapl_engine import config
from oapl_engine.config_file import build, read_toml
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.data.task import load_task
from oapl_engine.orchestrator.preflight import check_fields_are_read, check_names
from oapl_engine.rewards import VerifierPool
from oapl_engine.trainer.objective import make_objective, normalizer
from oapl_engine.trainer.optimizer import make_optimizer
from oapl_engine.trainer.packing import pack
from oapl_engine.trainer.packing_probe import choose_packing_mode
from oapl_engine.trainer.policy import Policy
from oapl_engine.trainer.selection import select_rollouts
from oapl_engine.trainer.step import train_step
from oapl_engine.weights.publish import Publisher, publish_paused
from oapl_engine.weights.transports import make_buckets
from tests.conftest import ROOT
from tests.support.engines import ReceiverEngine, assert_identical
from tests.support.fused_model import FusedModel, trainer_tensors
from tests.support.models import make_network
from tests.support.rollouts import random_group

SECTIONS = ("An objective", "A reward", "A data source", "A transport", "A model family")


def recipe_of(tables):
    """recipes/micro.toml with these tables, validated as `oapl train` does."""
    micro = read_toml(ROOT / "recipes" / "micro.toml")
    merged = {name: micro.get(name, {}) | tables.get(name, {}) for name in {*micro, *tables}}
    recipe = build(config.Recipe, merged, "recipe")
    config.check_cross_fields(recipe)
    return recipe


@pytest.mark.parametrize("section", SECTIONS)
def test_a_run_accepts_the_recipe(example, section):
    tables = example(section).tables
    check_names(recipe_of(tables))
    check_fields_are_read(recipe_of(tables), [f"--{name}.{field}" for name, table in tables.items() for field in table])


def test_the_objective_trains_a_policy(example):
    section = recipe_of(example("An objective").tables).objective
    groups = [random_group(number, 9, [5, 3, 7], rewards=[0.0, 1.0, 0.5]) for number in range(2)]
    selection = select_rollouts(groups, section, max_new_tokens=8)
    objective = make_objective(section, selection.beta2)
    policy = Policy(make_network("llama").eval(), None, torch.device("cpu"), torch.float32)
    choose_packing_mode(policy)
    before = [parameter.detach().clone() for parameter in policy.model.parameters()]
    result = train_step(
        policy,
        make_optimizer(policy, config.OptimizerConfig()),
        pack(selection.groups, 64, True),
        objective,
        learning_rate=1e-3,
        normalizer=normalizer(objective, len(selection.keys), selection.tokens, 8),
    )
    assert result.stepped
    assert result.metrics["tokens/trained"] == 2 * (5 + 3 + 7)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_the_objective_is_what_its_docstring_says(example):
    section = recipe_of(example("An objective").tables).objective
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(20, 8)
    target, behavior, advantage = torch.randint(0, 20, (7,)), -3 * torch.rand(7), torch.tensor([1.0, -2.0])
    offsets = torch.tensor([0, 3, 7])
    objective = make_objective(section, beta2=1.0)
    inputs = PolicyInputs(behavior, advantage)
    fused_policy_loss(hidden, weight, target, offsets, objective, inputs, normalizer=7).loss.backward()
    found, hidden.grad = hidden.grad, None
    logprob = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    gain = advantage.repeat_interleave(offsets.diff()) * (logprob - behavior)
    ((0.5 - gain).clamp_min(0).sum() / 7).backward()
    torch.testing.assert_close(found, hidden.grad)


def test_the_reward_runs_in_a_process_that_is_killed_in_time(example):
    """The reward is computed in a process that is killed in time."""
    reward = recipe_of(example("A reward").tables).reward
    items = [(text, {"answer": "42"}) for text in ("The answer is 42", "41", "nothing", "")]
    with closing(VerifierPool(reward.workers, reward.timeout_seconds, reward.memory_mb)) as pool:
        verdicts = pool.verify_many(reward.name, items, reward.options)
        unusable = pool.verify_many(reward.name, [("1", {})], reward.options)
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.8, 0.0, 0.0]
    assert verdicts[1].detail == {"answer": 41.0}
    assert unusable[0].status == "error"


def test_the_source_gives_prompts_and_held_out_problems(example):
    data = recipe_of(example("A data source").tables).data
    tokenizer = micro_tokenizer()
    task = load_task(data, seed=0, tokenizer=tokenizer)
    assert len(task.held_out) == 32
    assert task.size == 500 - 32
    prompts = [task.prompt(position) for position in range(task.size)]
    assert len({prompt.id for prompt in prompts}) == task.size
    assert {prompt.id for prompt in prompts}.isdisjoint(prompt.id for prompt in task.held_out)
    number = int(prompts[0].id.removeprefix("square-"))
    assert tokenizer.decode(prompts[0].token_ids) == f"{number}*{number}="
    assert prompts[0].record == {"question": f"{number}*{number}=", "answer": str(number**2)}


def test_the_transport_publishes_complete_weights(example):
    name = recipe_of(example("A transport").tables).weights.transport
    trainer, engine = trainer_tensors(), ReceiverEngine(FusedModel())
    publisher = Publisher(
        trainer.items,
        engine,
        bucket_bytes=512,
        dtype=torch.float32,
        make_buckets=lambda size: make_buckets(name, size),
    )
    for version in (1, 2):
        publish_paused(publisher, version)
        assert_identical(engine.receiver.model, trainer, FusedModel)
        for tensor in trainer.values():
            tensor += torch.randn_like(tensor)
    folder = Path(publisher.buckets.folder.name)
    publisher.close()
    assert not folder.exists()


def test_the_transport_loads_in_vllm_without_the_trainer(example):
    """The transport is loaded in vllms processes without the trainer."""
    module = example("A transport").module
    code = f"import sys, {module}; print([m for m in ('transformers', 'pydantic', 'vllm') if m in sys.modules])"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert done.stdout.strip() == "[]", done.stderr


def test_the_family_is_packed_exactly(example, tmp_path):
    family = importlib.import_module(example("A model family").module)
    family.make_small(tmp_path / "model")
    policy = family.load_small(tmp_path / "model")
    assert policy.packing_mode.share
    assert policy.packing_mode.together
    assert np.isfinite(policy.head.weight.detach().numpy()).all()
