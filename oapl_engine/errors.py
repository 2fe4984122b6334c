"""What goes wrong in words that a user can act on, and the exit codes of the command line."""

import contextlib
import difflib
import importlib
import io
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

OK, FAILED, BAD_INPUT, DIFFERENCE, INTERRUPTED = 0, 1, 2, 3, 130
READER_GONE = 141  # as a shell reports a program that SIGPIPE ended


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
    with naming_own_code(f'{field} = "{path}": {module} fails when imported'):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f'{field} = "{path}" cannot be loaded: {error}; write "package.module:name" of something that Python '
                "can import: a file in the current folder, beside the recipe, or on PYTHONPATH"
            ) from error


@contextlib.contextmanager
def naming_own_code(what: str) -> Iterator[None]:
    """Raises ConfigError, with the traceback, for whatever a user's own code raises: its sys.exit() too, which would
    end the program as if all had been done. ConfigErrors pass."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what}:\n{traceback.format_exc().rstrip()}") from error


def find_modules_in(*folders: Path) -> None:
    """Let load_object find modules in these folders too, behind everything that is found without them."""
    for folder in map(str, folders):
        if folder not in sys.path:
            sys.path.append(folder)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`, the main function of a program.

    Bad input, a run that cannot continue, and Ctrl-C are reported in one line on stderr; a pipe whose reader has gone
    (`| head`) ends the program without a word; output that cannot be written is one line too. What the terminal's
    encoding does not have is printed as "?".
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # Python's own stderr does so already
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return work()
        finally:
            sys.stdout.flush()  # here, and not when Python ends and can only print a traceback
    except ConfigError as error:
        return _report(f"error: {error}", BAD_INPUT)
    except RunError as error:
        return _report(f"error: {error}", FAILED)
    except KeyboardInterrupt:
        return _report("stopped", INTERRUPTED)
    except BrokenPipeError:
        abandoned = _abandoned_streams()
        if not abandoned:
            raise
        for number in abandoned:  # what is still buffered goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return READER_GONE
    except OSError as error:
        if error.filename or not _is_unwritable(1):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _report(f"error: the output cannot be written: {error.strerror}", FAILED)


def _report(text: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
    return code


def _abandoned_streams() -> list[int]:
    """File descriptors of stdout and stderr, where they are pipes that nobody reads any more."""
    watch = select.poll()
    for number in (1, 2):
        watch.register(number, 0)
    return [number for number, events in watch.poll(0) if events & select.POLLERR]


def _is_unwritable(number: int) -> bool:
    """Whether a stream takes nothing more: its disk is full, or /dev/full."""
    try:
        os.write(number, b"\n")
    except OSError:
        return True
    return False
