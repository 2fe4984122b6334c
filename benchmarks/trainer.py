"""One trainer step with each prompt computed once against padded batches that repeat it (Hugging Face style).

SmolLM2-135M's shapes with random weights, one group: prompt 128, eight responses of 32 to 128 tokens. Every side ends
in the same loss, clipping and AdamW. "padded" has two heads: logits of every position, as transformers computes them,
and ours (predicting rows only, fused loss), so that only packing and sharing make the difference. Times are medians of
interleaved rounds, with CPU seconds beside them, which wander less on a shared machine; memory is what a fresh process
adds while it computes one gradient (VmHWM after clear_refs).

    python -m benchmarks trainer [--rounds 5] [--precision float32] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from oapl_kernels.objectives import oapl
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from oapl_engine import config
from oapl_engine.samples import Batch, Rollout
from oapl_engine.trainer import attention
from oapl_engine.trainer.head import policy_loss
from oapl_engine.trainer.loading import DTYPES
from oapl_engine.trainer.optimizer import make_optimizer
from oapl_engine.trainer.packing import TrainGroup, pack
from oapl_engine.trainer.packing_probe import choose_packing_mode
from oapl_engine.trainer.policy import Policy
from oapl_engine.trainer.step import accumulate_gradients

PROMPT, GROUP, SHORTEST, LONGEST = 128, 8, 32, 128
BETA2 = 0.1
KINDS = ("padded, all logits", "padded, our head", "packed", "shared")


def main(argv: list[str]) -> int:
    """Print the table; 0, or 3 where the bars (2x faster, 0.5x memory, gradients 5e-6 in float32) are missed."""
    parser = argparse.ArgumentParser(prog="benchmarks trainer", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repetitions")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="float32", help="of matrix products")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.memory_of:
        print(extra_memory(options.memory_of, options.precision))
        return 0
    figures = measure(options.rounds, options.precision)
    show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if met(figures) else 3


def smollm2(precision: str) -> Policy:
    """SmolLM2-135M's architecture on random weights."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    policy = Policy(LlamaForCausalLM(settings).eval(), None, torch.device("cpu"), DTYPES[precision])
    choose_packing_mode(policy)
    policy.model.train()
    return policy


def group() -> TrainGroup:
    """One prompt, eight responses, random tokens and advantages."""
    draw = np.random.default_rng(0)
    prompt = draw.integers(5, 49152, PROMPT)
    lengths = draw.integers(SHORTEST, LONGEST + 1, GROUP)
    rollouts = [_rollout(i, prompt, draw.integers(5, 49152, n), draw) for i, n in enumerate(lengths)]
    return TrainGroup(tuple(rollouts), draw.normal(size=GROUP).astype(np.float32))


def _rollout(i: int, prompt: np.ndarray, response: np.ndarray, draw: np.random.Generator) -> Rollout:
    tokens = np.concatenate([prompt, response]).astype(np.int32)
    mask = (np.arange(len(tokens)) >= PROMPT).astype(np.uint8)
    behavior = (mask * draw.uniform(-11.5, -10.5, len(tokens))).astype(np.float32)
    return Rollout(f"0.p.0.{i}", "p", "0.p.0", i, "", tokens, PROMPT, mask, behavior, (), "stop", "scored", 0.0)


def gradient_of(kind: str, policy: Policy, item: TrainGroup) -> tuple[Callable[[], None], int]:
    """A function that adds the group's gradient to .grad, and how many tokens it computes."""
    if kind in ("packed", "shared"):
        batches = pack([item], 1 << 20, kind == "shared")
        return lambda: _packed(policy, batches), sum(len(b.token_ids) for b in batches)
    ids, mask = _pad(item)
    (batch,) = pack([item], 1 << 20, False)
    gradient = _all_logits if kind == "padded, all logits" else _our_head
    return lambda: gradient(policy, item, batch, ids, mask), ids.numel()


def _packed(policy: Policy, batches: list[Batch]) -> None:
    policy.model.set_attn_implementation(attention.NAME)
    accumulate_gradients(policy, batches, oapl(beta2=BETA2), normalizer=GROUP)


def _pad(item: TrainGroup) -> tuple[Tensor, Tensor]:
    width = max(len(r.token_ids) for r in item.rollouts)
    ids, mask = torch.zeros(2, GROUP, width, dtype=torch.long)
    for i, r in enumerate(item.rollouts):
        ids[i, : len(r.token_ids)] = torch.from_numpy(r.token_ids)
        mask[i, : len(r.token_ids)] = 1
    return ids, mask


def _all_logits(policy: Policy, item: TrainGroup, batch: Batch, ids: Tensor, mask: Tensor) -> None:
    policy.model.set_attn_implementation("sdpa")
    with policy.precision():
        logits = policy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logprob = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    loss = logprob.new_zeros(())
    for i, r in enumerate(item.rollouts):
        rows = slice(PROMPT - 1, len(r.token_ids) - 1)
        log_ratio = (logprob[i, rows] - torch.from_numpy(r.behavior_logprob[PROMPT:])).sum()
        loss = loss + (BETA2 * log_ratio - float(item.advantage[i])) ** 2 / GROUP
    loss.backward()


def _our_head(policy: Policy, item: TrainGroup, batch: Batch, ids: Tensor, mask: Tensor) -> None:
    policy.model.set_attn_implementation("sdpa")
    with policy.precision():
        hidden = policy.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = torch.cat([hidden[i, : len(r.token_ids) - 1] for i, r in enumerate(item.rollouts)])
        loss = policy_loss(policy.head, rows, batch, oapl(beta2=BETA2), normalizer=GROUP, temperature=1.0)
    loss.loss.backward()


def measure(rounds: int, precision: str) -> dict[str, object]:
    extra = {kind: _in_fresh_process(kind, precision) for kind in KINDS}
    policy, item = smollm2(precision), group()
    optimizer = make_optimizer(policy, config.OptimizerConfig(learning_rate=1e-9))
    runs = {kind: gradient_of(kind, policy, item) for kind in KINDS}
    differences = _differences(policy, {kind: run for kind, (run, _) in runs.items()})
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, (run, _) in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            seconds[kind].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    rows = {
        kind: {
            "tokens": runs[kind][1],
            "seconds": statistics.median(wall for wall, _ in seconds[kind]),
            "cpu_seconds": statistics.median(cpu for _, cpu in seconds[kind]),
            "extra_mb": extra[kind],
            "gradient_difference": differences[kind],
        }
        for kind in KINDS
    }
    return {"precision": precision, "threads": torch.get_num_threads(), "rounds": rounds, "rows": rows}


def _differences(policy: Policy, runs: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Of each kind's gradient from the first kind's, relative, over all parameters together."""
    reference: list[Tensor] = []
    found = {}
    for kind, run in runs.items():
        policy.model.zero_grad(set_to_none=False)
        run()
        gradient = [p.grad for p in policy.model.parameters()]
        reference = reference or [g.clone() for g in gradient]
        off = sum((g - r).double().square().sum() for g, r in zip(gradient, reference, strict=True))
        found[kind] = float((off / sum(r.double().square().sum() for r in reference)) ** 0.5)
    policy.model.zero_grad(set_to_none=False)
    return found


def extra_memory(kind: str, precision: str) -> float:
    """MB that computing the gradient adds to a process whose weights and gradients are there already."""
    policy = smollm2(precision)
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run, _ = gradient_of(kind, policy, group())
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1e3


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _in_fresh_process(kind: str, precision: str) -> float:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", "import sys; from benchmarks.trainer import main; main(sys.argv[1:])"]
    command += ["--memory-of", kind, "--precision", precision]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True)
    return float(done.stdout.split()[-1])


def show(figures: dict) -> None:  # type: ignore[type-arg]
    rows = figures["rows"]
    last = rows["shared"]
    print(f"{figures['precision']}, {figures['threads']} threads, {figures['rounds']} rounds")
    print(
        "| batch | tokens | s/step | shared is faster | CPU s | less CPU | extra MB | shared needs | gradient off by |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for kind, row in rows.items():
        faster, needs = row["seconds"] / last["seconds"], last["extra_mb"] / row["extra_mb"]
        print(
            f"| {kind} | {row['tokens']} | {row['seconds']:.2f} | {faster:.2f}x | {row['cpu_seconds']:.2f} | "
            f"{row['cpu_seconds'] / last['cpu_seconds']:.2f}x | {row['extra_mb']:.0f} | {needs:.2f}x | "
            f"{row['gradient_difference']:.1e} |"
        )


def met(figures: dict) -> bool:  # type: ignore[type-arg]
    """Against padding with logits of every position: at least 2x faster, at most half the memory, the same gradient."""
    padded, shared = (figures["rows"][kind] for kind in ("padded, all logits", "shared"))
    equal = shared["gradient_difference"] <= (5e-6 if figures["precision"] == "float32" else 0.2)
    return equal and padded["seconds"] >= 2 * shared["seconds"] and shared["extra_mb"] <= 0.5 * padded["extra_mb"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
