"""Phased training on one device that cannot hold engine and trainer together: the real core, the real engine server and
the real trainer state, on a fake vLLM and a fake memory that refuse a wrong order."""

import asyncio
import contextlib
import queue
import sys
from types import SimpleNamespace

import msgspec
import pytest
import torch

from oapl_engine import config
from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.server import EngineServer
from oapl_engine.scheduler import core, driver
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.state import State
from oapl_engine.trainer import offload
from oapl_engine.trainer.optimizer import make_optimizer
from oapl_engine.weights.control import Attest, Bucket, Finish, Start
from tests.support.fake_machine import break_rule, make_settings

GPU = torch.device("cuda", 0)
WEIGHTS, CACHE = 40_000, 60_000


class Device:
    """Bytes by owner; more than its capacity is out of memory."""

    def __init__(self, capacity):
        self.capacity, self.held, self.peak = capacity, {}, 0

    def take(self, owner, size):
        assert owner not in self.held, f"{owner} was mapped twice"
        self.held[owner] = size
        self.peak = max(self.peak, sum(self.held.values()))
        assert sum(self.held.values()) <= self.capacity, f"out of memory: {self.held}"


class FakeLLM:
    """What EngineServer asks of vLLM, as it behaves on CUDA: memory by tags, no cache no generation."""

    def __init__(self, device):
        self.device = device
        self.engine_core = self
        self.good = True
        device.take("weights", WEIGHTS)
        device.take("kv_cache", CACHE)

    async def sleep(self, level):
        assert level == 2
        self.good = False
        del self.device.held["weights"], self.device.held["kv_cache"]

    async def wake_up(self, tags):
        for tag in tags:
            self.device.take(tag, {"weights": WEIGHTS, "kv_cache": CACHE}[tag])

    async def start_weight_update(self):
        assert "weights" in self.device.held, "weights arrive where no memory is"

    async def update_weights(self, request):
        self.good = True

    async def generate(self, prompt, params, name):
        assert "kv_cache" in self.device.held, "generated without a cache"
        assert self.good, "generated with discarded weights"
        yield SimpleNamespace(num_cached_tokens=0)

    async def collective_rpc(self, method):
        return []

    async def call_utility_async(self, method):
        assert method == "oapl_cached_blocks"
        return 0

    async def pause_generation(self, mode, clear_cache):
        pass

    async def reset_prefix_cache(self, *_, **__):
        return True

    async def resume_generation(self):
        pass

    async def finish_weight_update(self, version):
        pass


class Phased:
    """The commands of a phased run, carried out on one Device."""

    def __init__(self, policy, capacity, monkeypatch):
        self.policy, self.device, self.monkeypatch = policy, Device(capacity), monkeypatch
        self.optimizer = make_optimizer(policy, config.OptimizerConfig(learning_rate=1e-3))
        self.server = EngineServer(FakeLLM(self.device), EngineOptions("", version=-1), on_cpu=False)
        self.inbox, self.count = queue.SimpleQueue(), 0

    def handlers(self):
        server = self.server
        handlers = {
            e.Submit: self.submit,
            e.Pause: lambda c: asyncio.run(server.pause(c.mode)),
            e.Resume: lambda c: asyncio.run(server.resume()),
            e.Sleep: lambda c: asyncio.run(server.sleep(list(c.tags))) or e.EngineSlept(),
            e.Wake: lambda c: (
                asyncio.run(server.wake(list(c.tags))) or (e.EngineWoke() if "weights" in c.tags else None)
            ),
            e.LoadTrainer: lambda c: self.move(GPU),
            e.OffloadTrainer: lambda c: self.move(torch.device("cpu")),
            e.Publish: lambda c: asyncio.run(self.publish(c.version)),
            e.Train: self.train,
            e.Checkpoint: lambda c: e.CheckpointDone(c.step),
        }
        return {command: [handler] for command, handler in handlers.items()}

    def wake(self, command):
        asyncio.run(self.server.wake(list(command.tags)))
        return e.EngineWoke() if "weights" in command.tags else None

    def submit(self, command):
        for _ in range(command.n):
            asyncio.run(self.server._complete([1], None))
            self.count += 1
            self.inbox.put(e.GroupDone(f"g{self.count}", 1, self.server.weights.version))

    def move(self, device):
        """The real walk over parameters and moments; each tensor is copied, and its bytes change hands."""
        moved = []

        def copy(tensor, target):
            assert target == device
            moved.append(tensor.nbytes)
            return tensor.clone()

        self.monkeypatch.setattr(offload, "move_tensor", copy)
        assert offload.move_trainer(self.policy, self.optimizer, device) == sum(moved) > 0
        if device == GPU:
            self.device.take("trainer", sum(moved))
        else:
            del self.device.held["trainer"]

    async def publish(self, version):
        """The engine's half of a weight update, in the order of weights.Publisher."""
        for request in (Start(version), Bucket(0, 0, {}), Finish(), Attest(True)):
            if isinstance(request, Bucket):
                await self.server.llm.update_weights(request)
                continue
            reply = await self.server.updates.answer(msgspec.to_builtins(request))
            assert reply.error is None, reply.error
        return e.Published(version)

    def train(self, command):
        assert "trainer" in self.device.held, "trained without its state on the device"
        for parameter in self.policy.trainable().values():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        return e.StepDone(command.step)


@pytest.fixture
def phased(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **_: None))
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight  # tied
    trainable = lambda: dict(model.named_parameters())  # noqa: E731
    policy = SimpleNamespace(model=model, device=torch.device("cpu"), trainable=trainable)
    return Phased(policy, WEIGHTS + CACHE + 1000, monkeypatch)


SETTINGS = make_settings(steps=6, lag=2, max_groups_ahead=4, evaluate=False)


def test_engine_and_trainer_take_turns_on_one_device(phased):
    start = phased.policy.model[0].weight.clone()
    phased.inbox.put(e.EngineReady(0))
    _, code = driver.drive(State(SETTINGS), phased.inbox, phased.handlers())
    assert code == 0
    assert phased.device.peak == WEIGHTS + CACHE
    model = phased.policy.model
    assert model[1].weight is model[0].weight, "tied weights went apart"
    assert torch.allclose(start - model[0].weight, torch.tensor(6e-3), rtol=1e-3), "Adam lost its moments on the way"
    assert all(p.grad is None for p in model.parameters()) or phased.policy.device == GPU


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (core._must_sleep, "out of memory"),
        (core._must_offload, "out of memory"),
        (core._must_wake, "memory was given back"),
    ],
)
def test_a_wrong_order_is_refused(phased, rule, message, monkeypatch):
    break_rule(monkeypatch, rule, lambda s: False)
    phased.inbox.put(e.EngineReady(0))
    with pytest.raises(AssertionError, match=message), contextlib.suppress(queue.Empty):
        driver.drive(State(SETTINGS), phased.inbox, phased.handlers())


def test_weights_do_not_arrive_in_memory_that_was_given_back(phased):
    """The engine itself refuses, too."""
    server = phased.server
    asyncio.run(server.pause("drain"))
    for _ in range(2):  # asleep already: nothing is unmapped twice
        asyncio.run(server.sleep(["weights", "kv_cache"]))
    reply = asyncio.run(server.updates.answer(msgspec.to_builtins(Start(0))))
    assert "memory was given back" in reply.error
    asyncio.run(server.wake(["weights"]))
    assert set(phased.device.held) == {"weights"}
    asyncio.run(server.wake(["weights"]))  # awake already: nothing is mapped twice
    with pytest.raises(RuntimeError, match="incomplete"):
        asyncio.run(server.resume())
