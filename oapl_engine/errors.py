"""What goes wrong in words that a user can act on, and the exit codes of the command line."""

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

OK, FAILED, BAD_INPUT, DIFFERENCE, INTERRUPTED = 0, 1, 2, 3, 130


class ConfigError(ValueError):
    """Bad input in a recipe or on the command line: exit code 2."""


class RunError(RuntimeError):
    """A run cannot continue, for a reason that its message explains: one line, exit code 1."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean …?`, or the complete list where nothing is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(valid)}"


def load_object(path: str, field: str) -> Any:
    """The object that `path` = "package.module:name" names. Raises ConfigError that names the recipe's `field`.

    Example: `load_object("math:sqrt", "reward.name")` returns `math.sqrt`.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'{field} = "{path}" cannot be loaded: {error}; write "package.module:name" of something that Python can '
            "import: a file in the current folder, beside the recipe, or on PYTHONPATH"
        ) from error
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ConfigError(f'{field} = "{path}": {module} fails when imported:\n{traceback.format_exc()}') from error


def find_modules_in(*folders: Path) -> None:
    """Let load_object find modules in these folders too, behind everything that is found without them."""
    for folder in map(str, folders):
        if folder not in sys.path:
            sys.path.append(folder)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`; bad input, a run that cannot continue, and Ctrl-C are reported in one line on stderr."""
    try:
        return work()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
