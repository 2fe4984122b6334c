"""What differs between the versions of the code that benchmarks/against.py compares: one class per version."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")
OLD_MESSAGES = {"EngineSlept": "Slept", "EngineWoke": "Awake", "Start": "Tick"}


class Before:
    """Commit a537eb7 and those before it."""

    def policy(self, network: Any) -> Any:
        from oapl_engine.trainer.model import Policy, choose_layout

        policy = Policy(network, None, CPU, torch.float32)
        choose_layout(policy)
        return policy

    def optimizer(self, policy: Any, learning_rate: float) -> Any:
        from oapl_engine import config
        from oapl_engine.trainer.optimizer import make_optimizer

        return make_optimizer(policy, config.Optimizer(learning_rate=learning_rate))

    def train_group(self, rollouts: tuple[Any, ...], advantage: Any) -> Any:
        from oapl_engine.trainer.packing import Item

        return Item(rollouts, advantage)

    def train_step(self, beta2: float) -> Callable[..., Any]:
        from oapl_engine.trainer.step import train_step

        return functools.partial(train_step, beta2=beta2)

    def publisher(self, tensors: dict[str, torch.Tensor], ask: Callable[[Any], Any], bucket_bytes: int) -> Any:
        from oapl_engine.weights.publish import Publisher

        def control(phase: str, payload: dict[str, Any]) -> Any:
            if phase in ("pause", "resume", "attest"):
                return {"error": None, "reports": []}
            return ask([phase, payload])

        return Publisher(tensors.items, control, bucket_bytes)

    def answer(self, update: Any, message: Any) -> Any:
        phase, payload = message
        if phase == "init":
            update.init(**payload, unused=[])
        elif phase == "bucket":
            update.receive(**payload)
        else:
            {"start": update.start, "finish": update.finish}[phase]()
        return {"error": None, "reports": [update.report()]}

    def recorded_run(self, run: dict[str, Any]) -> tuple[Any, list[Any]]:
        from oapl_engine.scheduler import core
        from oapl_engine.scheduler import events as e

        settings, left = dict(run["settings"], mode=run["mode"]), run["state"]
        for name in ("generates", "overlaps"):
            del settings[name]
        settings["credit"] = settings.pop("max_groups_ahead")
        settings["allowance"] = settings.pop("max_uses")
        left["buffer"] = core.Buffer(core.Waiting(*group) for group in left["buffer"])
        rows = (row | {"name": OLD_MESSAGES.get(row["name"], row["name"])} for row in run["messages"])
        messages = [e.from_row(row) for row in rows]
        return core.State(core.Settings(**settings), **left), [m for m in messages if isinstance(m, e.Event)]


class Now:
    """The version that this file is part of."""

    def policy(self, network: Any) -> Any:
        from oapl_engine.trainer.packing_probe import choose_packing_mode
        from oapl_engine.trainer.policy import Policy

        policy = Policy(network, None, CPU, torch.float32)
        choose_packing_mode(policy)
        return policy

    def optimizer(self, policy: Any, learning_rate: float) -> Any:
        from oapl_engine import config
        from oapl_engine.trainer.optimizer import make_optimizer

        return make_optimizer(policy, config.OptimizerConfig(learning_rate=learning_rate))

    def train_group(self, rollouts: tuple[Any, ...], advantage: Any) -> Any:
        from oapl_engine.trainer.packing import TrainGroup

        return TrainGroup(rollouts, advantage)

    def train_step(self, beta2: float) -> Callable[..., Any]:
        """beta2 is a property of the objective."""
        from oapl_engine.trainer.step import train_step

        return train_step

    def publisher(self, tensors: dict[str, torch.Tensor], ask: Callable[[Any], Any], bucket_bytes: int) -> Any:
        import msgspec

        from oapl_engine.weights.control import Attest, UpdateReply
        from oapl_engine.weights.publish import Publisher

        class Control:
            def update(self, request: Any) -> Any:
                if isinstance(request, Attest):
                    return UpdateReply()
                return msgspec.convert(ask(msgspec.to_builtins(request)), UpdateReply)

        return Publisher(tensors.items, Control(), bucket_bytes=bucket_bytes)

    def answer(self, update: Any, message: Any) -> Any:
        import msgspec

        from oapl_engine.weights.control import Bucket, Finish, Init, Start, UpdateRequest

        match msgspec.convert(message, UpdateRequest):
            case Init(manifest, layout, buffers):
                update.init(manifest, layout, buffers)
            case Start():
                update.start()
            case Bucket(bucket, length, checksums):
                update.receive(bucket, length, checksums)
            case Finish():
                update.finish()
        return {"reports": [update.report()]}

    def recorded_run(self, run: dict[str, Any]) -> tuple[Any, list[Any]]:
        import msgspec

        from oapl_engine.scheduler import events as e
        from oapl_engine.scheduler.buffer import Buffer, BufferedGroup
        from oapl_engine.scheduler.state import Settings, State

        left = run["state"]
        left["buffer"] = Buffer(BufferedGroup(*group) for group in left["buffer"])
        messages = msgspec.convert(run["messages"], list[e.ANY])
        return State(Settings(**run["settings"]), **left), [m for m in messages if isinstance(m, e.Event)]


def this_version() -> Before | Now:
    """Of the checkout that is the working directory."""
    return Now() if importlib.util.find_spec("oapl_engine.trainer.packing_mode") else Before()
