"""Published objectives, one a file; each factory returns an `Objective` for `fused_policy_loss`."""

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
    factory.__name__: factory for factory in (oapl, grpo, dr_grpo, dapo, tis, gspo, cispo, decoupled_ppo, topr, kimi)
}

__all__ = [*OBJECTIVES, "OBJECTIVES", "Objective", "PolicyInputs", "soft_overlong_penalty", "with_reference_kl"]
