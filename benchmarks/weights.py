"""Publishing weights into a live vLLM engine on CPU, against a two-process copy and against vLLM's own ways.

Every publish is whole: pause, cast of float32 masters to bfloat16, checksums on both sides, scatter into the engine's
live parameters, read-back, proof of the layers, prefix cache, a probe prompt, resume. "copy" moves the same float32
tensors through the same two buckets into another process with the same cast and nothing else. Trainer and engine work
at once and share the cores; in the row "memfd, in turn" each bucket is packed, sent and taken before the next one, and
"memcpy" is of the same buckets inside the engine's process, alone as the scatter of that row is. vLLM's own ways are
measured in a stock engine, layers packed; "re-pack" is what keeping packed layers would add to each of our publishes.
Seconds are medians of rounds after the first. 7B rows are predicted from bytes and bandwidths, and say so.

    python -m benchmarks weights [--models smollm2 0.6b 1.7b] [--rounds 5] [--json FILE]
    python -m benchmarks weights --show FILE
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oapl_engine  # noqa: F401  before torch: keeps its idle threads from spinning on shared cores

# isort: split
import numpy as np
import torch
from oapl_kernels import backend
from safetensors.torch import save_file

from benchmarks._in_turn import InTurn
from benchmarks._two_process_copy import copy_seconds
from oapl_engine.data.model_folder import SMOLLM2, resolve_model
from oapl_engine.inference.options import EngineOptions
from oapl_engine.rollout.session import EngineSession
from oapl_engine.weights.attest import TOLERANCE, ProbePrompts
from oapl_engine.weights.bucket_layout import lay_out
from oapl_engine.weights.control import EngineControl, Inspect
from oapl_engine.weights.publish import Publisher, publish_paused
from oapl_engine.weights.transports import Buckets, make_buckets

BUCKET = 64 << 20
PHASES = ("pack", "take", "check", "scatter", "read_back", "finish", "attest", "total")
QWEN3 = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144},
}
TRANSPORTS = ("memfd", "file", "gloo")
IN_TURN = "memfd, in turn"
PROBE = "Natalia sold 48 clips in April, and half as many in May. In all she sold"  # 16 tokens and more


def main(argv: list[str]) -> int:
    """Print the tables; 0, or 3 where a bar is missed. With --json, models measured before are kept in the file."""
    parser = argparse.ArgumentParser(prog="benchmarks weights", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=["smollm2", *SHAPES, "micro"], default=["smollm2"])
    parser.add_argument("--rounds", type=int, default=5, help="publishes measured after the first")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--show", help="print the tables of this file and measure nothing")
    options = parser.parse_args(argv)
    if options.show:
        show(json.loads(Path(options.show).read_text(encoding="utf-8")))
        return 0
    path = Path(options.json) if options.json else None
    figures = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    figures["predicted"] = predicted()
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="oapl-benchmark-") as scratch:
            figures[name] = measure(name, options.rounds, Path(scratch))
    show(figures)
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if all(met(row) for name, row in figures.items() if name != "predicted") else 3


def checkpoint(name: str, scratch: Path) -> tuple[str, Any]:
    """Folder and float32 trainer model: SmolLM2, or random weights in the shape of a Qwen3."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    if name == "smollm2":
        folder = resolve_model(SMOLLM2)
        return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    shape = {**QWEN3, **SHAPES[name]} if name in SHAPES else {**small, "hidden_size": 64, "intermediate_size": 96}
    config = Qwen3Config(vocab_size=151936 if name in SHAPES else 512, tie_word_embeddings=True, **shape)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.to(torch.bfloat16).save_pretrained(scratch / "model")
    return str(scratch / "model"), model.to(torch.float32)


def measure(name: str, rounds: int, scratch: Path) -> dict[str, Any]:
    folder, model = checkpoint(name, scratch)
    layout = lay_out(model.named_parameters(), torch.bfloat16, BUCKET)
    moved = 2 * sum(part.length for part in layout.slices)
    row: dict[str, Any] = {"bytes": moved, "bucket_bytes": layout.size, "threads": torch.get_num_threads()}
    extension = backend.extension()
    row["instruction_set"] = extension.instruction_set() if extension else "no C++ extension"
    row["copy"] = copy_seconds(model.named_parameters, layout, rounds)
    row["transports"] = publishes(folder, model, rounds, scratch)
    row["save"] = save_seconds(model, max(2, rounds // 2), scratch / "saved")
    row["vllm"] = vllm_paths(folder, rounds)
    return row


def publishes(folder: str, model: Any, rounds: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Median seconds by phase for each transport, into one live engine."""
    prompt = probe_tokens(folder, model.config.vocab_size)
    timing = "benchmarks._vllm_paths.Timed"
    options = EngineOptions(folder, dtype="bfloat16", max_model_len=256, kv_cache_mb=256, worker_extension=timing)
    found: dict[str, dict[str, float]] = {}
    with EngineSession(options, scratch / "engine.log") as session:
        versions = itertools.count(1)
        for way in (*TRANSPORTS, IN_TURN):
            with open_publisher(way, model, session.control, prompt) as publisher:
                reports, timed = [], []
                for _ in range(rounds + 1):
                    change(model)
                    reports.append(timed_publish(publisher, next(versions)))
                    timed.append(session.control.update(Inspect()).reports[0])
            row = {n: statistics.median(r[n] for r in reports[1:] if n in r) for n in reports[-1]}
            row |= {"first": reports[0]["total"], "changed_share": reports[-1]["changed_share"]}
            row |= {name: statistics.median(t[name] for t in timed[1:]) for name in ("memcpy", "repack")}
            row["score"] = statistics.median(seconds_of(session.control.score, prompt) for _ in range(5))
            found[way] = row
    return found


def timed_publish(publisher: Publisher, version: int) -> dict[str, float]:
    """Seconds by phase, `total` from pause to resume, and changed_share."""
    begin = time.perf_counter()
    report = publish_paused(publisher, version)
    return report.seconds | {"total": time.perf_counter() - begin, "changed_share": report.changed_share}


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


@contextlib.contextmanager
def open_publisher(way: str, model: Any, control: EngineControl, prompt: list[int]) -> Iterator[Publisher]:
    """A publisher for one row of the table, closed afterwards."""
    turns = InTurn(control) if way == IN_TURN else None

    def make(size: int) -> Buckets:
        buckets = make_buckets(way.partition(",")[0], size)
        return turns.follow(buckets) if turns else buckets

    def trainer_logprobs(prompts: Any) -> list[np.ndarray]:
        if turns:
            turns.wait_for_score()
        return logprobs(model, prompts)

    probes = ProbePrompts([prompt], trainer_logprobs, TOLERANCE["bfloat16"])
    publisher = Publisher(
        model.named_parameters, turns or control, bucket_bytes=BUCKET, probes=probes, make_buckets=make
    )
    try:
        yield publisher
    finally:
        publisher.close()


def probe_tokens(folder: str, vocabulary: int) -> list[int]:
    """16 ids: of a text that the model may know, or at random for random weights."""
    from transformers import AutoTokenizer

    if not Path(folder, "tokenizer_config.json").exists():
        return np.random.default_rng(0).integers(2, vocabulary, 16).tolist()
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(PROBE)["input_ids"]
    return ids[:16]


@torch.no_grad()
def change(model: Any) -> None:
    """A step that bfloat16 shows in a part of the values, as an optimizer's does."""
    for parameter in model.parameters():
        parameter.mul_(torch.empty_like(parameter).uniform_(0.998, 1.002))


@torch.no_grad()
def logprobs(model: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    tokens = torch.tensor(prompts)
    logits = model(tokens).logits[:, :-1].log_softmax(-1)
    return list(logits.gather(2, tokens[:, 1:, None])[..., 0].numpy())


def save_seconds(model: Any, rounds: int, folder: Path) -> float:
    """To write the bfloat16 checkpoint that an engine could reload from disk, without fsync."""
    folder.mkdir()
    seconds = []
    for number in range(rounds + 1):
        change(model)
        begin = time.perf_counter()
        tensors = {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}
        save_file(tensors, folder / f"{number}.safetensors")
        seconds.append(time.perf_counter() - begin)
        (folder / f"{number}.safetensors").unlink()
    return statistics.median(seconds[1:])


def vllm_paths(folder: str, rounds: int) -> dict[str, float]:
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    more |= {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-m", "benchmarks._vllm_paths", folder, "bfloat16", str(rounds)]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def predicted() -> dict[str, Any]:
    """7B (15.2 GB of bfloat16) on H100: bytes that each phase moves over the bandwidth it moves them with."""
    size, hbm, nvlink, pcie = 15.2e9, 0.8 * 3.35e12, 0.8 * 450e9, 0.8 * 64e9
    passes = {"pack": 3, "check": 1, "scatter": 2, "changed": 2, "read_back": 1}  # of the payload, reads and writes
    device = sum(passes.values()) * size / hbm
    return {
        "label": "predicted, not measured",
        "bytes": size,
        "cuda_ipc, one GPU": device,
        "nccl over NVLink": device + size / nvlink,
        "pinned memory over PCIe 5": device + size / pcie,
    }


def show(figures: dict[str, Any]) -> None:
    rows = {name: row for name, row in figures.items() if name != "predicted"}
    print(f"| model, transport | {' | '.join(PHASES)} |")
    print("|---" * (len(PHASES) + 1) + "|")
    for name, row in rows.items():
        for transport, seconds in row["transports"].items():
            what = f"{name}, {row['bytes'] / 1e6:.0f} MB, {transport}" if transport == "memfd" else transport
            print(f"| {what} | {' | '.join(f'{seconds[p]:.3f}' for p in PHASES)} |")
    print(f"\n| what | aim | {' | '.join(rows)} |")
    print("|---" * (len(rows) + 2) + "|")
    for what in next(iter(map(beside, rows.values())), {}):
        print(f"| {what} | | {' | '.join(f'{beside(row)[what]:.3f} s' for row in rows.values())} |")
    for what, aim in AIMS.items():
        found = [ratios(row)[what] for row in rows.values()]
        print(f"| {what} | {aim}x | {' | '.join(f'{x:.2f}x' if x >= aim else f'**{x:.2f}x**' for x in found)} |")
    machines = sorted({f"{row['threads']} threads a process, {row['instruction_set']}" for row in rows.values()})
    print(f"\n{'; '.join(machines)}; two buckets of {BUCKET / 1e6:.0f} MB at most. Bold: the aim is missed.")
    ways = {way: s for way, s in figures["predicted"].items() if isinstance(s, float) and way != "bytes"}
    print(f"7B on H100, predicted, not measured: {'; '.join(f'{way} {s * 1e3:.0f} ms' for way, s in ways.items())}.")


def proven(seconds: dict[str, float]) -> float:
    """Pack, move, check, scatter, attest by checksums and layers: all that grows with bytes. Without probe prompts."""
    return seconds["transfer"] + seconds["finish"]


def beside(row: dict[str, Any]) -> dict[str, float]:
    """Seconds of what a publish is measured against, and of parts of it alone on the cores."""
    alone = row["transports"][IN_TURN]
    return {
        "two-process copy of the same tensors through the same buckets, same cast": row["copy"],
        "the engine's part of a probe prompt, alone on the cores": alone["score"],
        "writing a bfloat16 checkpoint (no fsync)": row["save"],
        "vLLM's reload of a checkpoint (page cache warm), in a stock engine": row["vllm"]["reload from disk"],
        "vLLM's layerwise reload of tensors in its memory": row["vllm"]["layerwise from memory"],
        "re-pack of the layers, which keeping packed kernels would add to each publish": alone["repack"],
    }


AIMS = {
    "scatter against a memcpy of the same buckets, both alone on the cores": 0.6,
    "publish without probe prompt against the two-process copy": 0.3,
    "publish with probe prompt against the two-process copy": 0.3,
    "whole publish against the reload from disk, nothing written": 10,
    "whole publish against writing a checkpoint and reloading it": 10,
    "whole publish against the layerwise reload": 10,
}


def ratios(row: dict[str, Any]) -> dict[str, float]:
    memfd, alone = row["transports"]["memfd"], row["transports"][IN_TURN]
    found = (
        alone["memcpy"] / alone["scatter"],
        row["copy"] / proven(memfd),
        row["copy"] / (proven(memfd) + memfd["attest"]),
        row["vllm"]["reload from disk"] / memfd["total"],
        (row["save"] + row["vllm"]["reload from disk"]) / memfd["total"],
        row["vllm"]["layerwise from memory"] / memfd["total"],
    )
    return dict(zip(AIMS, found, strict=True))


def met(row: dict[str, Any]) -> bool:
    return all(ratios(row)[what] >= aim for what, aim in AIMS.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
