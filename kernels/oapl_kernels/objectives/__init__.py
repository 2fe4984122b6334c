"""OBJECTIVES: published objectives by name; each factory returns an `Objective` for `fused_policy_loss`.

A new one is a file and a line here. One from elsewhere needs no line: see docs/extending.md.
"""

from .cispo import cispo
from .dapo import dapo, soft_overlong_penalty
from .decoupled_ppo import decoupled_ppo
from .dr_grpo import dr_grpo
from .grpo import grpo
from .gspo import gspo
from .kimi import kimi
from .oapl import oapl
from .objective import Objective, PolicyInputs
from .reference_kl import with_reference_kl
from .tis import tis
from .topr import topr

OBJECTIVES = {
    "oapl": oapl,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "tis": tis,
    "gspo": gspo,
    "cispo": cispo,
    "decoupled_ppo": decoupled_ppo,
    "topr": topr,
    "kimi": kimi,
}

__all__ = [*OBJECTIVES, "OBJECTIVES", "Objective", "PolicyInputs", "soft_overlong_penalty", "with_reference_kl"]
