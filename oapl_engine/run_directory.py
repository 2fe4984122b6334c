"""The run directory: one run at a time, one recipe for its life, everything it needs to go on after a kill."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

import tomli_w

from oapl_engine.config import ConfigError, Recipe, load_recipe, to_toml
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog
from oapl_engine.scheduler import core

FREE = ("report", "run")  # sections that may change between a kill and the resume


def open_run(recipe: Recipe) -> tuple[Path, IO[str]]:
    """The directory with config.toml in it, and the lock to hold while the run lives. Raises ConfigError."""
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
    stored = path / "config.toml"
    if stored.exists():
        _check_same(load_recipe(stored), recipe, path)
    else:
        _write_whole(stored, tomli_w.dumps(to_toml(recipe)))
    return path, lock


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _check_same(stored: Recipe, given: Recipe, path: Path) -> None:
    for section in dataclasses.fields(Recipe):
        if section.name in FREE and section.name != "run":
            continue
        a, b = getattr(stored, section.name), getattr(given, section.name)
        for field in dataclasses.fields(a):
            if (section.name, field.name) in (("run", "dir"), ("run", "threads")):
                continue
            x, y = getattr(a, field.name), getattr(b, field.name)
            if x != y:
                raise ConfigError(
                    f"run.dir = {path} belongs to another recipe: {section.name}.{field.name} was {x!r}, now {y!r}; "
                    "name a new --run.dir, or repeat the old value to resume"
                )


def resume_state(settings: core.Settings, step: int, log: RolloutLog, journal: Journal, evaluated: int) -> core.State:
    """The scheduler's state after a kill: `step` is that of the checkpoint that was loaded (0: none).

    Steps that were begun after the checkpoint are replayed with the same groups; what the log holds beyond them waits.
    """
    steps = journal.steps()
    replay = tuple(s.groups for s in steps if s.step > step)
    used: dict[str, int] = {}
    for s in steps:
        for key in s.groups:
            used[key] = used.get(key, 0) + 1
    versions = tuple((v, s) for v, s in journal.versions())
    return core.State(
        settings,
        step=step,
        next_version=1 + max((v for v, _ in versions), default=-1),
        published_step=max((s for _, s in versions), default=0),
        version_steps=versions,
        buffer=_waiting(settings, log, journal, used),
        replay=replay,
        evaluated=evaluated,
        checkpointed=step,
    )


def _waiting(
    settings: core.Settings, log: RolloutLog, journal: Journal, used: dict[str, int]
) -> tuple[core.Waiting, ...]:
    disposed = journal.dispositions()
    waiting = []
    for key in log.group_keys():
        group = log.group(key)
        free = [r for r in group.scored() if r.key not in disposed]
        if len(free) >= 2 and used.get(key, 0) < settings.allowance:
            waiting.append(core.Waiting(key, group.version, used.get(key, 0)))
    return tuple(waiting)


def read_evaluations(run_dir: str | Path) -> dict[int, dict[str, Any]]:
    """Rows of eval.jsonl for k = 1, by optimizer step."""
    path = Path(run_dir) / "eval.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["step"]: row for row in rows if row["k"] == 1}
