"""What binds a run directory besides its recipe: contents of files, code of the user's own, ranks, package versions.

A resumed run that stands on something else under the same name would mix two experiments without a word.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from oapl_engine.config import Recipe
from oapl_engine.errors import ConfigError
from oapl_engine.files import read_json, replace_text
from oapl_engine.fingerprint import code_fingerprint, file_fingerprint, model_fingerprint, package_versions
from oapl_engine.rollout_log.database import CorruptLogError
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog

FILE = "bound.json"
OWN_CODE = (("data", "source"), ("reward", "name"), ("objective", "name"), ("weights", "transport"))
LEFT_BY_A_START = ("config.toml", FILE, "eval.jsonl", "eval_problems.jsonl", "events.jsonl", "metrics.jsonl")


def read_contents(recipe: Recipe, model: str, world: int) -> dict[str, Any]:
    """What the run stands on now, by the field that names it. model: the resolved model.path. Raises ConfigError."""
    contents: dict[str, Any] = {"model.path": model_fingerprint(model), "ranks": world}
    if recipe.data.path:
        contents["data.path"] = file_fingerprint(recipe.data.path)
    for section, field in OWN_CODE:
        if code := code_fingerprint(getattr(getattr(recipe, section), field)):
            contents[f"{section}.{field}"] = code
    return contents | {"packages": package_versions()}


def check_contents(directory: Path, recipe: Recipe, now: dict[str, Any], say: Callable[[str], None]) -> None:
    """Raises ConfigError where the run was started on other contents; other package versions are allowed, and said."""
    file = directory / FILE
    if not file.exists():
        return
    before = read_json(file)
    if not isinstance(before, dict) or not isinstance(before.get("packages"), dict) or "ranks" not in before:
        raise ConfigError(f"{file} is damaged: it lacks ranks or packages; restore it from a copy, or remove it")
    if before["ranks"] != now["ranks"]:
        raise ConfigError(
            f"run.dir = {directory} was written by {before['ranks']} ranks, now there are {now['ranks']}: start "
            f"torchrun with --nproc-per-node {before['ranks']}, or name a new run.dir"
        )
    for name in sorted({*before, *now} - {"ranks", "packages"}):
        if before.get(name) != now.get(name):
            section, field = name.split(".")
            raise ConfigError(
                f"run.dir = {directory} was started on other contents of {name} = "
                f"{getattr(getattr(recipe, section), field)!r}: they changed under the same name; restore them to "
                "resume, or name a new --run.dir"
            )
    for package in sorted({*before["packages"], *now["packages"]}):
        old, new = before["packages"].get(package), now["packages"].get(package)
        if old != new:
            say(f"warning: the run was started with {package} {old}, now it is {new}: its numbers may change")


def save_contents(directory: Path, now: dict[str, Any]) -> None:
    """Keep what the run stands on."""
    replace_text(directory / FILE, json.dumps(now, indent=1) + "\n")


def is_claimed(directory: Path) -> bool:
    """Whether a run has done work here that another recipe must not continue: a checkpoint, a step, or a group."""
    checkpoints = directory / "checkpoints"
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        return True
    try:
        for path in directory.glob("journal*.sqlite"):
            with closing(Journal(path)) as journal:
                if journal.steps():
                    return True
        for path in directory.glob("rollouts/rank*.sqlite"):
            with closing(RolloutLog(path)) as log:
                if log.group_keys():
                    return True
    except CorruptLogError:
        return True  # another version's, or damaged: not ours to remove
    return False


def clear_failed_start(directory: Path) -> None:
    """Remove what a start left that failed before its first group: it would be taken for this run's."""
    for path in [
        *(directory / name for name in LEFT_BY_A_START),
        *directory.glob("journal*.sqlite*"),
        *directory.glob("probe*.json"),
    ]:
        path.unlink(missing_ok=True)
    shutil.rmtree(directory / "rollouts", ignore_errors=True)
