"""Writes tests/unit/golden: what the version before names and formats changed computes, decides and stores.

Runs on a checkout of that version, whose names it translates to today's:

    cd CHECKOUT && PYTHONPATH=kernels:.:tests/scheduler python …/tests/support/record_golden.py …/tests/unit/golden
"""

import gzip
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

# Factory and its arguments; by position, so that a renamed argument is the same case.
OBJECTIVES = {
    "oapl": (0.05,),
    "grpo": (),
    "dr_grpo": (),
    "dapo": (),
    "tis": (),
    "gspo": (),
    "cispo": (),
    "decoupled_ppo": (),
    "topr": (),
    "kimi": (0.05,),
}
LENGTHS, DEPTH, VOCABULARY = (5, 1, 19, 40), 33, 257
OPTIONS = {"temperature": 0.9, "softcap": 5.0, "chunk_tokens": 16}
METRICS = {
    "step": "step",
    "lag_min": "off_policy/min",
    "lag_mean": "off_policy/mean",
    "lag_max": "off_policy/max",
    "reward_mean": "reward/all/mean",
    "loss": "loss",
    "residual_mean": "residual/mean",
    "advantage_mean": "advantage/mean",
    "value_mean": "value/mean",
    "entropy": "entropy/all/mean",
    "grad_norm": "optim/grad_norm",
    "log_ratio_mean": "log_ratio/mean",
    "log_ratio_std": "log_ratio/std",
    "log_ratio_max": "log_ratio/max",
    "response_tokens_mean": "seq_len/mean",
    "truncated_share": "is_truncated/mean",
    "equal_group_share": "filters/zero_variance",
    "tokens_generated": "tokens/generated",
    "tokens_trained": "tokens/trained",
    "learning_rate": "optim/lr",
    "beta2": "beta2",
    "ledger": "ledger",
}
MESSAGES = {"Slept": "EngineSlept", "Awake": "EngineWoke", "Tick": "Start"}


def instruction_set() -> str:
    """What must be the same for the same bits: processor, instructions, torch, and whether native code is built."""
    from oapl_kernels.backend import extension

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    native = "with" if extension() else "without"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {vendor} {capability} torch {torch.__version__} {native} native code"


def head_values(path: str, name: str, dtype: torch.dtype) -> dict[str, float | list[float]]:
    """Loss, log-probs and gradient sums of one objective. path: fused_policy_loss | linear_logprob."""
    from oapl_kernels import fused_policy_loss, linear_logprob
    from oapl_kernels.objectives import OBJECTIVES as FACTORIES

    hidden, weight, bias, target, offsets, inputs = _head_inputs(dtype)
    objective = FACTORIES[name](*OBJECTIVES[name])
    if path == "fused_policy_loss":
        arguments = (hidden, weight, target, offsets, objective, inputs)
        result = fused_policy_loss(*arguments, normalizer=4.0, entropy_coefficient=0.02, bias=bias, **OPTIONS)
        loss, logprob = result.loss, result.logprob
    else:
        logprob = linear_logprob(hidden, weight, target, bias=bias, **OPTIONS)
        loss = objective.fn(logprob, replace(inputs, cu_seqlens=offsets)) / 4.0
    loss.backward()
    values: dict[str, float | list[float]] = {"loss": loss.item(), "logprob": logprob.tolist()}
    for label, leaf in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        values |= {f"{label}/sum": leaf.grad.double().sum().item(), f"{label}/norm": leaf.grad.double().norm().item()}
    return values


def _head_inputs(dtype: torch.dtype) -> tuple:
    from oapl_kernels import PolicyInputs

    draw, tokens = np.random.default_rng(0), sum(LENGTHS)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(draw.standard_normal(shape)).to(dtype)

    hidden, weight, bias = normal(tokens, DEPTH), normal(VOCABULARY, DEPTH) * 0.3, normal(VOCABULARY)
    target = torch.from_numpy(draw.integers(0, VOCABULARY, tokens))
    with torch.no_grad():
        z = OPTIONS["softcap"] * torch.tanh(torch.nn.functional.linear(hidden, weight, bias) / OPTIONS["softcap"])
        near = torch.log_softmax(z / OPTIONS["temperature"], -1).gather(1, target[:, None])[:, 0]
    inputs = PolicyInputs(
        behavior_logprob=near + 0.1 * normal(tokens),
        advantage=normal(len(LENGTHS)),
        proximal_logprob=near + 0.05 * normal(tokens),
        reference_logprob=near + 0.1 * normal(tokens),
        mask=torch.from_numpy(draw.random(tokens) > 0.15),
    )
    offsets = torch.tensor([0, *np.cumsum(LENGTHS)])
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    return (*leaves, target, offsets, inputs)


def record_head(folder: Path) -> None:
    torch.set_num_threads(1)
    values = {
        f"{path} {name} {str(dtype).removeprefix('torch.')}": head_values(path, name, dtype)
        for path in ("fused_policy_loss", "linear_logprob")
        for name in OBJECTIVES
        for dtype in (torch.float32, torch.float64)
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    (folder / "head.json").write_text(
        f'{{"instruction_set": {json.dumps(instruction_set())}, "values": {{\n{lines}\n}}}}\n', encoding="utf-8"
    )


def record_scheduler(folder: Path, runs: int = 200) -> None:
    """Random runs of the fake machine; a line has the settings, the state at the start, and all messages in order."""
    lines = [json.dumps(_scheduler_run(random.Random(seed)), separators=(",", ":")) for seed in range(runs)]
    (folder / "scheduler.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))


def _scheduler_run(draw: random.Random) -> dict:
    from world import World

    from oapl_engine.scheduler import events as e

    class Measured(World):
        """Steps report a KL divergence where the settings bound it."""

        def train(self, step, keys):
            super().train(step, keys)
            if self.state.settings.max_kl is not None:
                self.pending[-1] = e.StepDone(step, round(draw.random(), 3))

    state = _draw_state(draw)
    rates = [draw.choice([0.0, rate]) for rate in (0.02, 0.3, 0.5, 0.01)]
    if state.settings.mode == "offline":
        rates[0] = 0.0
    machine = Measured(state, draw, *rates)
    machine.run()
    rows = [e.to_row(message) for message in machine.log]
    return {
        "mode": state.settings.mode,
        "settings": _translate_settings(state.settings),
        "state": {
            "step": state.step,
            "next_version": state.next_version,
            "version_steps": state.version_steps,
            "evaluated": state.evaluated,
            "checkpointed": state.checkpointed,
            "replay": state.replay,
            "buffer": [(group.key, group.version, group.uses) for group in state.buffer],
        },
        "messages": [row | {"name": MESSAGES.get(row["name"], row["name"])} for row in rows],
    }


def _draw_state(draw: random.Random):
    """A run's start, or what a killed run left: steps to be replayed and groups that wait."""
    from oapl_engine.scheduler import core

    mode = draw.choice(["sync", "phased", "async", "offline"])
    on_publish = draw.choice(["drain", "abort", "keep"])
    steps, per_step = draw.randint(1, 12), draw.randint(1, 4)
    lag = {"sync": 1, "offline": steps}.get(mode, draw.randint(1, 6))
    carries = mode == "async" or (mode == "phased" and on_publish == "keep")
    settings = core.Settings(
        mode=mode,
        steps=steps,
        groups_per_step=per_step,
        lag=lag,
        window=2 if carries else 1,
        credit=lag * per_step + draw.randint(0, 5),
        allowance=draw.randint(1, 3),
        on_publish=on_publish,
        max_kl=draw.choice([None, None, 0.7]),
        checkpoint_every=draw.randint(0, 3),
        evaluate=mode != "offline" and draw.random() < 0.5,
        evaluate_every=draw.randint(0, 3),
        engines=draw.randint(1, 3),
        resample=draw.random() < 0.5,
    )
    state = core.State(settings)
    if mode == "offline":
        groups = draw.randint(1, steps * per_step)
        return replace(state, buffer=core.Buffer(core.Waiting(f"file{i}", 0) for i in range(groups)))
    if draw.random() < 0.2 and lag > 1 and steps > 1:
        done = draw.randint(0, min(lag, steps) - 1)
        replay = tuple(
            tuple(f"old{i}.{j}" for j in range(per_step)) for i in range(draw.randint(0, min(lag, steps) - done))
        )
        waiting = core.Buffer(core.Waiting(f"waits{i}", 0) for i in range(draw.randint(0, per_step)))
        left = {"step": done, "checkpointed": done, "evaluated": 0, "next_version": 1, "version_steps": ((0, 0),)}
        state = replace(state, replay=replay, buffer=waiting, **left)
    return state


def _translate_settings(settings) -> dict:
    fields = asdict(settings)
    mode = fields.pop("mode")
    fields["max_groups_ahead"] = fields.pop("credit")
    fields["max_uses"] = fields.pop("allowance")
    return {"generates": mode != "offline", "overlaps": mode == "async", **fields}


def record_offline(folder: Path) -> None:
    """A model of 28 thousand parameters, six optimizer steps on finished rollouts, and what the run leaves on disk.

    The run happens in a temporary folder, with relative paths: no path of this machine gets into its config.toml.
    """
    checkout, here = Path.cwd(), tempfile.mkdtemp()
    environment = {**os.environ, "PYTHONPATH": f"{checkout / 'kernels'}:{checkout}"}

    def oapl(command: str, recipe: str, *words: str) -> None:
        program = [sys.executable, "-m", "oapl_engine.cli", command, str(checkout / "recipes" / recipe)]
        subprocess.run([*program, "--run.threads", "1", *words], cwd=here, env=environment, check=True)

    size = ("--model.hidden", "32", "--model.layers", "2", "--model.heads", "2")
    oapl("sft", "micro_sft.toml", "--train.steps", "20", "--model.out", "start_model", *size)
    rollouts = checkout / "experiments" / "data" / "micro_sort6_rollouts.jsonl"
    shutil.copy(rollouts, Path(here, "rollouts.jsonl"))
    common = ("--model.path", "start_model", "--data.path", "rollouts.jsonl", "--train.precision", "float32")
    often = ("--checkpoint.every", "3", "--checkpoint.keep", "2")
    oapl("train", "micro_offline.toml", *common, "--run.dir", "run", "--schedule.steps", "6", *often)
    few = rollouts.read_text(encoding="utf-8").splitlines()[:16]  # two groups: a run directory that is small
    Path(here, "rollouts.jsonl").write_text("\n".join(few) + "\n", encoding="utf-8")
    less = ("--schedule.steps", "1", "--schedule.groups_per_step", "2")
    oapl("train", "micro_offline.toml", *common, "--run.dir", "old_run", *less)
    shutil.rmtree(Path(here, "old_run", "checkpoints"))
    for source in ("start_model", "run/checkpoints/step_000003", "old_run"):
        target = folder / Path(source).name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(Path(here, source), target)
    _write_offline_values(folder / "offline.json", Path(here, "run"))
    shutil.rmtree(here)


def _write_offline_values(path: Path, run: Path) -> None:
    import sqlite3

    with sqlite3.connect(run / "journal.sqlite") as journal:
        hashes = dict(journal.execute("SELECT step, weight_hash FROM step WHERE state = 'done' ORDER BY step"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = [{new: row[old] for old, new in METRICS.items()} for row in rows]
    values = {"instruction_set": instruction_set(), "weight_hash": hashes, "metrics": metrics}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for record in (record_head, record_scheduler, record_offline):
        record(out)
