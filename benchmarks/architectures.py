"""How the trainer packs each architecture of the installed transformers, and how far it is from the model itself.

Of every tiny random model in benchmarks/tiny_architectures.json: the packing mode that load_policy chose, and the
largest difference of log-probs (nats) and of gradients (relative) from the model's own eager attention, one sequence
at a time. The sequences are longer than the windows and chunks of these models.

    python -m benchmarks architectures [NAME …] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from oapl_kernels.objectives import oapl
from torch import Tensor

from benchmarks._tiny_architectures import ARCHITECTURES, make_tiny
from oapl_engine.config import ModelConfig, TrainConfig
from oapl_engine.errors import ConfigError
from oapl_engine.samples import Prompt, make_rollout
from oapl_engine.trainer.loading import load_policy, silence_transformers
from oapl_engine.trainer.packing import TrainGroup
from oapl_engine.trainer.packing_probe import largest_difference, unpacked_logprob
from oapl_engine.trainer.policy import Policy
from oapl_engine.trainer.step import accumulate_gradients

CPU = torch.device("cpu")
BETA2 = 0.1
LENGTHS = ((21, (12, 30, 1)), (40, (7, 25)))  # per group: prompt, responses


@dataclass(frozen=True)
class Finding:
    """What became of one architecture.

    mode:      "share", "pack", "one by one", or "refused"
    attention: that the policy runs
    nats:      largest difference of a log-prob from eager attention
    gradient:  norm of the difference of all gradients together, relative
    reason:    why prompts are not shared, or why the model is refused
    """

    mode: str
    attention: str | None = None
    nats: float | None = None
    gradient: float | None = None
    reason: str | None = None


def main(argv: list[str]) -> int:
    """Measure and print; 0, or 1 where a model is neither refused nor within 1e-4 nats of itself."""
    parser = argparse.ArgumentParser(prog="benchmarks architectures", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *ARCHITECTURES])
    parser.add_argument("--json", help="write the findings to this file")
    options = parser.parse_args(argv)
    findings = {}
    for name in options.names or ARCHITECTURES:
        findings[name] = measure(name)
        print(show(name, findings[name]), flush=True)
    if options.json:
        figures = {"transformers": transformers.__version__, "findings": {n: asdict(f) for n, f in findings.items()}}
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(not all(map(is_right, findings.values())))


def show(name: str, finding: Finding) -> str:
    """One line of the table."""
    figures = "" if finding.nats is None else f"{finding.nats:8.1e} nats {finding.gradient or np.nan:8.1e} gradient "
    return f"{name:32} {finding.mode:10} {finding.attention or '':12} {figures}{finding.reason or ''}"


def is_right(finding: Finding) -> bool:
    """Whether the model is refused, or trained as it is."""
    if finding.nats is None or finding.gradient is None:
        return finding.mode == "refused"
    return finding.nats <= 1e-4 and finding.gradient <= 1e-3


def measure(name: str) -> Finding:
    """Load the architecture's tiny model as a run does, and compare. Whatever is raised but ConfigError is a fault."""
    with tempfile.TemporaryDirectory() as folder:
        with silence_transformers():
            network = make_tiny(name, Path(folder))
        checkpoint = network.supports_gradient_checkpointing
        train = TrainConfig(precision="float32", checkpoint_activations=checkpoint)
        try:
            policy = load_policy(ModelConfig(path=folder), train, CPU)
        except ConfigError as error:
            return Finding("refused", reason=str(error).replace(folder, "FOLDER").partition("\n")[0])
    return compare(policy, network)


def compare(policy: Policy, network: transformers.PreTrainedModel) -> Finding:
    """The policy's packed log-probs and gradients against those of the network with eager attention."""
    groups = random_groups(policy.vocabulary)
    logprob, gradient = own(network, groups)
    batches = policy.batches(groups, 256, True)
    losses = accumulate_gradients(policy, batches, oapl(beta2=BETA2), normalizer=5, temperature=1.0)
    found = {}
    for batch, loss in zip(batches, losses, strict=True):
        found |= zip(batch.keys, loss.logprob.split(np.diff(batch.cu_seqlens).tolist()), strict=True)
    mode = policy.packing_mode
    return Finding(
        "share" if mode.share else "pack" if mode.together else "one by one",
        policy.model.config._attn_implementation,
        largest_difference(found, logprob),
        relative({n: p.grad for n, p in policy.trainable().items() if p.grad is not None}, gradient),
        mode.reason,
    )


def random_groups(vocabulary: int) -> list[TrainGroup]:
    """Groups of LENGTHS with random tokens and advantages."""
    draw, groups = np.random.default_rng(0), []
    for number, (length, lengths) in enumerate(LENGTHS):
        prompt = Prompt(f"p{number}", draw.integers(3, vocabulary, length).astype(np.int32), "random")
        about = {"spans": (), "finish": "stop", "status": "scored", "reward": 0.0}
        rollouts = tuple(
            make_rollout(prompt, str(number), i, draw.integers(3, vocabulary, n), -4.5, **about)
            for i, n in enumerate(lengths)
        )
        groups.append(TrainGroup(rollouts, draw.normal(size=len(rollouts)).astype(np.float32)))
    return groups


def own(network: transformers.PreTrainedModel, groups: list[TrainGroup]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Log-probs by rollout key and gradients by name of the same loss, one sequence at a time, all by transformers."""
    logprobs = {}
    for group in groups:
        for rollout, advantage in zip(group.rollouts, group.advantage, strict=True):
            values = unpacked_logprob.__wrapped__(network, rollout, CPU)
            behavior = torch.from_numpy(rollout.behavior_logprob[rollout.prompt_length :])
            ((BETA2 * (values - behavior).sum() - float(advantage)) ** 2 / 5).backward()
            logprobs[rollout.key] = values.detach()
    return logprobs, {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|found - expected| / |expected| over all gradients together; a missing one counts as zero."""
    names = found.keys() | expected.keys()
    zero = torch.zeros(())
    parts = [(found.get(n, zero).double() - expected.get(n, zero).double()).norm() for n in sorted(names)]
    return float(torch.stack(parts).norm() / torch.stack([g.double().norm() for g in expected.values()]).norm())
