"""The run directory: one run at a time, one recipe for its life, everything it needs to go on after a kill."""

import dataclasses
import fcntl
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from oapl_engine.config import Recipe, load_recipe
from oapl_engine.config_file import to_toml
from oapl_engine.distributed import ALONE, Ranks
from oapl_engine.errors import ConfigError
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog
from oapl_engine.scheduler import core

FREE = (("run", "dir"), ("run", "threads"), ("report", "tensorboard"), ("report", "wandb"))  # may change on resume
UNUSABLE = ("cleared", "lost", "dropped:group_too_small", "dropped:resampled")


@contextmanager
def open_run(recipe: Recipe) -> Iterator[Path]:
    """The directory, locked while the run lives. ConfigError also where another recipe ran."""
    path = Path(recipe.run.dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "a")  # noqa: SIM115 (held until the process ends)
    except OSError as error:
        raise ConfigError(f"run.dir = {path}: {error.strerror}; name a directory you may write to") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"run.dir = {path}: another process runs there now; wait for it, or name another") from error
    with lock:
        stored = path / "config.toml"
        if stored.exists():
            _check_same(load_recipe(stored), recipe, path)
        yield path


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Bind the directory to this recipe. Called when all input has proved good: a typing error binds nothing."""
    temporary = path / "config.tmp"
    temporary.write_text(tomli_w.dumps(to_toml(recipe)))
    os.replace(temporary, path / "config.toml")


def _check_same(stored: Recipe, given: Recipe, path: Path) -> None:
    for section in dataclasses.fields(Recipe):
        a, b = getattr(stored, section.name), getattr(given, section.name)
        for field in dataclasses.fields(a):
            if (section.name, field.name) in FREE:
                continue
            x, y = getattr(a, field.name), getattr(b, field.name)
            if x != y:
                raise ConfigError(
                    f"run.dir = {path} belongs to another recipe: {section.name}.{field.name} was {x!r}, now {y!r}; "
                    "name a new --run.dir, or repeat the old value to resume"
                )


def resume_state(
    settings: core.Settings, step: int, log: RolloutLog, journal: Journal, evaluated: int, ranks: Ranks = ALONE
) -> core.State:
    """The scheduler's state after a kill: `step` is that of the checkpoint that was loaded (0: none).

    Steps that were begun after the checkpoint are replayed with the same groups; what the logs of all ranks hold beyond
    them waits. Rank 0's journal alone says what was consumed.
    """
    own = {"steps": [(s.step, s.groups) for s in journal.steps()], "versions": journal.versions()}
    own["usable"] = _usable(log, journal)
    everyone = ranks.gather(own)
    steps = [(number, tuple(groups)) for number, groups in everyone[0]["steps"]]
    versions = tuple((v, s) for v, s in everyone[0]["versions"])
    in_turn = [pair for turn in itertools.zip_longest(*(r["usable"] for r in everyone)) for pair in turn if pair]
    return core.State(
        settings,
        step=step,
        next_version=1 + max((v for v, _ in versions), default=-1),
        published_step=max((s for _, s in versions), default=0),
        version_steps=core.in_window(versions, settings.window),
        buffer=core.Buffer(_waiting(in_turn, steps, settings.max_uses)),
        replay=tuple(groups for number, groups in steps if number > step),
        evaluated=evaluated,
        checkpointed=step,
    )


def _usable(log: RolloutLog, journal: Journal) -> list[tuple[str, int]]:
    """(id, version) of the log's groups that may be trained, in order of arrival."""
    disposed = journal.dispositions()
    groups = map(log.group, log.group_keys())
    return [(g.id, g.version) for g in groups if sum(disposed.get(r.key) not in UNUSABLE for r in g.scored()) >= 2]


def _waiting(
    usable: list[tuple[str, int]], steps: list[tuple[int, tuple[str, ...]]], max_uses: int
) -> Iterable[core.Waiting]:
    """The buffer after the journal's steps, in the order that an uninterrupted run would have it in."""
    waiting = {key: core.Waiting(key, version) for key, version in usable}
    for _, groups in steps:
        for used in [waiting.pop(key) for key in groups if key in waiting]:
            if used.uses + 1 < max_uses:
                waiting[used.key] = dataclasses.replace(used, uses=used.uses + 1)
    return waiting.values()
