"""How sequences may share a batch. Which mode a model computes exactly is found out by `packing_probe`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PackingMode:
    """How sequences may share a batch.

    share:     a group's prompt is computed once
    together:  several sequences are in one batch
    reason:    why not, for the log
    """

    share: bool = True
    together: bool = True
    reason: str | None = None


PACKING_MODES = (PackingMode(), PackingMode(share=False), PackingMode(share=False, together=False))  # best first


def packing_rule(config: object) -> str | None:
    """What the probe is too short to see, in a transformers config; None if nothing."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *rope.values()):  # of all layers, or of each kind of layer
        if isinstance(part, dict) and part.get("rope_type") in ("dynamic", "longrope"):
            return f"{part['rope_type']} RoPE depends on the longest position of the batch"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"{sorted(other)[0]} layers read other rows than attention does"
    if getattr(config, "attn_temperature_tuning", False):
        return "attention temperature depends on the number of the row"
    if getattr(config, "alibi", False):
        return "ALiBi depends on the distance between rows"
    return None
