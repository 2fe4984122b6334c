"""Tiny random models of transformers' causal LMs: architectures, and settings of them that change attention or head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from oapl_engine.data.micro import micro_tokenizer

# sizes:     fields that a config gets if it has them: other names for the same sizes; windows and choices are small
# plain:     model types with these fields alone
# settings:  name: [model type, fields besides them]
TABLE = json.loads(Path(__file__).with_name("tiny_architectures.json").read_text(encoding="utf-8"))
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in TABLE["plain"]} | TABLE["settings"]
LARGEST = 5_000_000  # parameters: a config whose sizes were not found is refused instead of filled


def make_tiny(name: str, folder: Path) -> PreTrainedModel:
    """The architecture's model with random float32 weights, with eager attention; saved to folder with a tokenizer."""
    kind, fields = ARCHITECTURES[name]
    config = AutoConfig.for_model(kind, **(_sizes(kind) | fields))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{name} has {parameters} parameters: its config has sizes that the table does not name")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        for parameter in network.parameters():
            # Far from uniform, and every gain, bias and sink in use.
            parameter.data.normal_(0, 0.15) if parameter.dim() > 1 else parameter.data.add_(
                torch.randn_like(parameter), alpha=0.1
            )
        network.tie_weights()
    network.save_pretrained(folder)
    micro_tokenizer().save_pretrained(folder)
    return network


def _sizes(kind: str) -> dict[str, Any]:
    default = AutoConfig.for_model(kind)
    fields = {}
    for field, value in TABLE["sizes"].items():
        try:
            present = getattr(default, field, None) is not None and not isinstance(
                getattr(type(default), field, None), property
            )
        except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError: layers may differ
            present = False
        if present:
            fields[field] = value
    return fields
