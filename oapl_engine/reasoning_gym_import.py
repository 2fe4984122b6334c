"""Importing reasoning_gym where pycosat is missing: it has no wheel and is needed for zebra puzzles only."""

import sys
import types
from typing import Any

from oapl_engine.errors import ConfigError


def provide_pycosat() -> None:
    """Call before importing reasoning_gym, which imports pycosat at module level. Idempotent."""
    try:
        import pycosat
    except ImportError:
        pycosat = sys.modules["pycosat"] = types.ModuleType("pycosat")
    if not hasattr(pycosat, "itersolve"):
        pycosat.itersolve = pycosat.solve = _refuse


def _refuse(*_: Any, **__: Any) -> None:
    raise ConfigError(
        'data.task = "zebra_puzzles" needs the package pycosat, which is not installed: pip install pycosat (needs a C '
        "compiler), or choose another task"
    )
