"""One measurement in one checkout: run by benchmarks/against.py, with that checkout as the working directory.

A first line on stdout says that it is ready; then a line on stdin asks for a sample, and a line on stdout has it. What
differs between the two versions of the code is in _against_versions.py, and nowhere else.

    python _against_worker.py NAME SCALE GOLDEN     (NAME of MEASUREMENTS; SCALE: full | small)
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Sample = Callable[[], float]
CPU = torch.device("cpu")


def micro_step(version: Any, small: bool, golden: str) -> Sample:
    """The model of recipes/micro_sft.toml: 8 groups of 8, prompt 7, responses of 5 to 8. A sample has 20 steps."""
    shape = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return _train_step(version, shape | heads, groups=8, prompt=7, responses=(5, 8), repeats=2 if small else 20)


def smollm2_step(version: Any, small: bool, golden: str) -> Sample:
    """SmolLM2-135M's shape, random weights: one group of 8, prompt 64, responses of 16 to 32 tokens."""
    shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    if small:
        shape |= {"vocab_size": 512, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    return _train_step(version, shape | heads, groups=1, prompt=64, responses=(16, 32), repeats=1)


def _train_step(
    version: Any, shape: dict[str, int], groups: int, prompt: int, responses: tuple[int, int], repeats: int
) -> Sample:
    from oapl_kernels.objectives import oapl
    from transformers import LlamaConfig, LlamaForCausalLM

    from oapl_engine.trainer.packing import pack

    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, max_position_embeddings=8192, **shape)).eval()
    policy = version.policy(network)
    network.train()
    draw = np.random.default_rng(0)
    batches = pack(
        [_group(version, draw, i, shape["vocab_size"], prompt, responses) for i in range(groups)], 8192, True
    )
    optimizer, train_step = version.optimizer(policy, 1e-9), version.train_step(0.1)

    def sample() -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            train_step(policy, optimizer, batches, oapl(0.1), learning_rate=1e-9, normalizer=8.0 * groups)
        return (time.perf_counter() - begin) / repeats

    return sample


def _group(version: Any, draw: Any, number: int, vocabulary: int, prompt: int, responses: tuple[int, int]) -> Any:
    from oapl_engine.samples import Rollout

    start, rollouts = draw.integers(3, vocabulary, prompt), []
    for i in range(8):
        tokens = np.concatenate([start, draw.integers(3, vocabulary, draw.integers(responses[0], responses[1] + 1))])
        mask = (np.arange(len(tokens)) >= prompt).astype(np.uint8)
        behavior = (mask * -draw.uniform(1, 5, len(tokens))).astype(np.float32)
        rollout = Rollout(
            key=f"0.{number}.0.{i}",
            prompt_id=str(number),
            group=f"0.{number}.0",
            sample=i,
            task="",
            token_ids=tokens.astype(np.int32),
            prompt_length=prompt,
            loss_mask=mask,
            behavior_logprob=behavior,
            spans=(),
            finish="stop",
            status="scored",
            reward=0.0,
        )
        rollouts.append(rollout)
    return version.train_group(tuple(rollouts), draw.normal(size=8).astype(np.float32))


def publish(version: Any, small: bool, golden: str) -> Sample:
    """float32 masters over memfd into a receiver process, bfloat16, without vLLM and without probe prompts."""
    from _plain_model import Size, named_shapes

    size = Size(2, 64, 128, 500) if small else Size(27, 576, 1536, 49152)  # 135.8 million parameters
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in named_shapes(size).items()}
    command = [sys.executable, __file__, "receiver", *map(str, size)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    def ask(message: Any) -> Any:
        print(json.dumps(message), file=child.stdin, flush=True)
        return json.loads(child.stdout.readline())  # type: ignore[union-attr]

    publisher = version.publisher(tensors, ask, 64 << 20)
    versions = iter(range(1, 1 << 30))

    def sample() -> float:
        for tensor in tensors.values():
            tensor.mul_(1.01)
        begin = time.perf_counter()
        publisher.publish(next(versions))
        return time.perf_counter() - begin

    return sample


def receive(version: Any, size: tuple[int, ...]) -> None:
    """The receiver process: requests and replies are JSON lines. It ends with its input."""
    from _plain_model import PlainModel, Size

    from oapl_engine.weights.receiver.update import InPlaceUpdate

    update = InPlaceUpdate(PlainModel(Size(*size), CPU))
    for line in sys.stdin:
        print(json.dumps(version.answer(update, json.loads(line))), flush=True)


def core_step(version: Any, small: bool, golden: str) -> Sample:
    """core.step over the events of the recorded runs of tests/unit/golden; a rate, events per second."""
    from oapl_engine.scheduler import core

    with gzip.open(golden) as stream:
        lines = stream.read().splitlines()
    runs = [version.recorded_run(json.loads(line)) for line in lines[: 10 if small else None]]
    count = sum(len(events) for _, events in runs)

    def sample() -> float:
        begin = time.perf_counter()
        for state, events in runs:
            for event in events:
                state, _ = core.step(state, event)
        return count / (time.perf_counter() - begin)

    return sample


def simulate(version: Any, small: bool, golden: str) -> Sample:
    """A cell of `python -m benchmarks scale`: async, L = 50, 256 devices."""
    from benchmarks.scale import cell

    def sample() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            row = cell("async", *((4, 4) if small else (256, 50)))
        return float(row["seconds"])

    return sample


def head(version: Any, small: bool, golden: str) -> Sample:
    """fused_policy_loss with OAPL, 1024 x 576 x 49152 in float32, forward and backward."""
    from oapl_kernels import PolicyInputs, fused_policy_loss
    from oapl_kernels.objectives import oapl

    tokens, depth, vocabulary = (64, 32, 256) if small else (1024, 576, 49152)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, depth, requires_grad=True)
    weight = (torch.randn(vocabulary, depth) * depth**-0.5).requires_grad_()
    target, offsets = torch.randint(0, vocabulary, (tokens,)), torch.arange(0, tokens + 1, tokens // 8)
    inputs = PolicyInputs(torch.full((tokens,), -10.0), torch.linspace(-1, 1, 8))

    def sample() -> float:
        hidden.grad = weight.grad = None
        begin = time.perf_counter()
        fused_policy_loss(hidden, weight, target, offsets, oapl(1e-3), inputs, normalizer=8.0).loss.backward()
        return time.perf_counter() - begin

    return sample


def command_line(version: Any, small: bool, golden: str) -> Sample:
    """`oapl --help` in a new process."""
    command = [sys.executable, "-m", "oapl_engine.cli", "--help"]

    def sample() -> float:
        begin = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - begin

    return sample


# Name to what makes its samples, and their unit.
MEASUREMENTS: dict[str, tuple[Callable[[Any, bool, str], Sample], str]] = {
    "train step, micro model": (micro_step, "s"),
    "train step, SmolLM2 shape": (smollm2_step, "s"),
    "publish, 135M parameters": (publish, "s"),
    "core.step": (core_step, "events/s"),
    "simulate, 256 devices": (simulate, "s"),
    "head, forward and backward": (head, "s"),
    "oapl --help": (command_line, "s"),
}


def main(argv: list[str]) -> None:
    import _plain_model  # noqa: F401 (publish and receive find it loaded)
    from _against_versions import this_version

    # This file's folder has served: its kernels.py would be taken for the PyPI package that transformers looks for.
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
    version = this_version()
    if argv[0] == "receiver":
        receive(version, tuple(map(int, argv[1:])))
        return
    name, scale, golden = argv
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    make, unit = MEASUREMENTS[name]
    sample = make(version, scale == "small", golden)
    sample()  # warms up
    print("ready", file=replies, flush=True)
    for _ in sys.stdin:
        print(json.dumps({"value": sample(), "unit": unit}), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
