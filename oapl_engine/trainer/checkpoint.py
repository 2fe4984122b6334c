"""Checkpoints: a Hugging Face folder plus optimizer, RNG and what the run adds; complete and verified, or not there.

Written to a temporary folder, every file hashed and fsynced, the manifest last, then renamed: a kill at any moment
leaves the earlier checkpoints as they were. A damaged file is named and never used. No pickle: safetensors and JSON.
What is not the model is in the subfolder `trainer`, because vLLM loads every *.safetensors next to config.json.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oapl_engine import config
from oapl_engine.errors import RunError
from oapl_engine.files import follow_umask
from oapl_engine.trainer.loading import load_policy, silence_transformers
from oapl_engine.trainer.policy import Policy, published_weights

log = logging.getLogger(__name__)
FORMAT = 1
MANIFEST, STATE, TEMPORARY = "manifest.json", "trainer", ".tmp-"
OPTIMIZER, RNG, EXTRA = f"{STATE}/optimizer.safetensors", f"{STATE}/rng.safetensors", f"{STATE}/extra.json"
ADAPTER = f"{STATE}/adapter.safetensors"


class CheckpointError(RunError):
    """A checkpoint cannot be written, or none of those there can be used."""


class CorruptCheckpointError(Exception):
    """What is wrong with a checkpoint, with the file named."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. extra: what the run stored (data position, version, …)."""

    path: Path
    step: int
    weight_hash: str
    extra: dict[str, Any]


def save(
    directory: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write directory/step_NNNNNN and delete all but the `keep` newest; `extra` must be JSON.

    Never overwrites: the same weights already there are left as they are, a damaged folder is moved aside, anything
    else raises CheckpointError, as do a full disk and missing permission; earlier checkpoints stay complete.
    """
    target = directory / f"step_{step:06d}"
    digest = weight_hash(policy.model)
    if target.exists() and _is_same(target, digest):
        return target
    temporary = directory / f"{TEMPORARY}{target.name}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
        (temporary / STATE).mkdir(parents=True)
        _write_files(temporary, policy, optimizer, extra)
        _write_manifest(temporary, step, digest)
        os.rename(temporary, target)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {target} cannot be written: {error}; free disk space or set run.dir to another disk (earlier "
            "checkpoints are complete)"
        ) from error
    for old in _folders(directory)[keep:]:
        # renamed first: a kill in the middle must not leave half a checkpoint under its name
        hidden = directory / f"{TEMPORARY}{old.name}"
        os.rename(old, hidden)
        shutil.rmtree(hidden)
    return target


def _is_same(target: Path, digest: str) -> bool:
    try:
        stored = verify(target).weight_hash
    except CorruptCheckpointError as problem:
        aside = target.with_name(f"{target.name}.damaged-{len(list(target.parent.glob(f'{target.name}.damaged-*')))}")
        log.warning("%s; moved to %s", problem, aside)
        os.rename(target, aside)
        return False
    if stored != digest:
        raise CheckpointError(
            f"{target} holds other weights of the same step: a checkpoint is never overwritten; move it"
        )
    return True


def _write_files(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]) -> None:
    adapter = {name: p.detach().contiguous() for name, p in policy.trainable().items() if ".lora_" in name}
    with silence_transformers():
        policy.model.save_pretrained(folder, state_dict=dict(published_weights(policy)) if adapter else None)
        if policy.tokenizer is not None:
            policy.tokenizer.save_pretrained(folder)
    if adapter:
        save_file(adapter, folder / ADAPTER)
    state = {
        f"{kind}/{name}": value.contiguous()
        for name, parameter in policy.trainable().items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(state, folder / OPTIMIZER)
    random = {"cuda": torch.cuda.get_rng_state(policy.device)} if policy.device.type == "cuda" else {}
    save_file({"cpu": torch.get_rng_state(), **random}, folder / RNG)
    (folder / EXTRA).write_text(json.dumps(dict(extra), allow_nan=False), encoding="utf-8")
    follow_umask(folder)


def _write_manifest(folder: Path, step: int, digest: str) -> None:
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": _hash(file)}
        _sync(file)
    content = {"format": FORMAT, "step": step, "weight_hash": digest, "files": files}
    manifest = json.dumps({"content": content, "sha256": _hash_json(content)}, indent=1)
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")
    for path in (folder / MANIFEST, folder / STATE, folder):
        _sync(path)


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folders(directory: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in directory.iterdir() if re.fullmatch(r"step_\d+", p.name)] if directory.is_dir() else []
    return sorted(found, key=lambda p: -int(p.name.removeprefix("step_")))


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, every byte checked. Raises CorruptCheckpointError with the file named."""
    try:
        stored = json.loads((folder / MANIFEST).read_bytes())
        content = stored["content"]
        if stored["sha256"] != _hash_json(content):
            raise ValueError("its own SHA-256 does not fit")
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        for name, expected in content["files"].items():
            file = folder / name
            if file.stat().st_size != expected["bytes"]:
                raise CorruptCheckpointError(
                    f"{file} is damaged: {file.stat().st_size} bytes, written were {expected['bytes']}"
                )
            if _hash(file) != expected["sha256"]:
                raise CorruptCheckpointError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST}")
        return Checkpoint(folder, content["step"], content["weight_hash"], json.loads((folder / EXTRA).read_bytes()))
    except OSError as error:
        raise CorruptCheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error


def load_newest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none at all. Damaged ones are named in the log.

    Raises CheckpointError where checkpoints are there but none verifies.
    """
    problems = []
    for folder in _folders(directory):
        try:
            return verify(folder)
        except CorruptCheckpointError as problem:
            log.warning("%s; falling back to an older checkpoint", problem)
            problems.append(str(problem))
    if not problems:
        return None
    raise CheckpointError(f"no checkpoint in {directory} can be used: {'; '.join(problems)}; start in another run.dir")


def resume_policy(
    checkpoint: Checkpoint, model: config.ModelConfig, train: config.TrainConfig, device: torch.device | None = None
) -> Policy:
    """The policy as it was saved. With LoRA the base comes from model.path, the adapters from the checkpoint."""
    if not model.lora_rank:
        return load_policy(replace(model, path=str(checkpoint.path)), train, device)
    policy = load_policy(model, train, device)
    adapter = load_file(checkpoint.path / ADAPTER)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.copy_(adapter[name])
    return policy


def restore(checkpoint: Checkpoint, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Put back the optimizer's state and torch's random generators. CheckpointError for another model's state."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(checkpoint.path / OPTIMIZER).items():
        kind, _, name = key.partition("/")
        state.setdefault(name, {})[kind] = value
    parameters = policy.trainable()
    if state and state.keys() != parameters.keys():
        raise CheckpointError(
            f"{checkpoint.path / OPTIMIZER} belongs to another model: {len(state)} parameters there, "
            f"{len(parameters)} here; use the recipe that wrote it"
        )
    for name, kinds in state.items():
        device = policy.device
        optimizer.state[parameters[name]] = {k: v if k == "step" else v.to(device) for k, v in kinds.items()}
    random = load_file(checkpoint.path / RNG)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and policy.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], policy.device)


def weight_hash(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter, tied ones once."""
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        digests = pool.map(_digest, sorted(model.named_parameters()))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest(item: tuple[str, nn.Parameter]) -> bytes:
    name, parameter = item
    data = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode() + b"\0").digest() + (
        hashlib.sha256(data).digest()
    )
