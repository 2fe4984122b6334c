"""Run: what all parts of a training run share. One process at a time per run directory, one recipe for its life."""

import dataclasses
import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w

from oapl_engine.config import ModelConfig, Recipe, load_recipe
from oapl_engine.config_file import to_toml
from oapl_engine.data.model_folder import resolve_model
from oapl_engine.distributed import Ranks
from oapl_engine.errors import ConfigError
from oapl_engine.files import name_disk_errors, replace_text
from oapl_engine.orchestrator.binding import (
    check_contents,
    clear_failed_start,
    is_claimed,
    read_contents,
    save_contents,
)
from oapl_engine.report.display import Display
from oapl_engine.rollout.session import EngineSession
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog
from oapl_engine.samples import Group
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.driver import Handler
from oapl_engine.stopwatch import Stopwatch

# Fields that may change when a run resumes.
MAY_CHANGE_ON_RESUME = (
    ("run", "dir"),
    ("run", "threads"),
    ("rollout", "memory_share"),
    ("report", "tensorboard"),
    ("report", "wandb"),
)


@dataclasses.dataclass
class Run:
    """The state that the handlers of commands share. A handler knows the run, never another handler.

    recipe:           as given
    model:            the recipe's, with the path resolved to a folder
    directory:        the run directory
    ranks:            the processes of this run
    log:              rollouts of this rank
    journal:          what was consumed and published; rank 0's is the only truth
    display:          progress for people
    stopwatch:        seconds by activity since the last step
    step:             optimizer steps done; set by Learner
    position:         in the order of prompts, from which a resumed run must look; set by Learner and Generator
    version:          newest published policy version, 0 before the first; set by WeightSync
    publish_metrics:  metrics of the last publish; set by WeightSync
    """

    recipe: Recipe
    model: ModelConfig
    directory: Path
    ranks: Ranks
    log: RolloutLog
    journal: Journal
    display: Display
    stopwatch: Stopwatch
    step: int = 0
    position: int = 0
    version: int = 0
    publish_metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)

    def handlers(self) -> dict[type, Handler]:
        return {
            e.Clear: lambda command: self.record_disposition(command.keys, "cleared"),
            e.Resample: lambda command: self.record_disposition(command.keys, "dropped:resampled"),
        }

    def record_disposition(self, keys: Sequence[str], column: str) -> None:
        """Groups that will not be trained: their scored rollouts end in this column of the ledger."""
        scored = (rollout.key for group in self.local_groups(keys) for rollout in group.scored())
        self.journal.dispose(dict.fromkeys(scored, column))

    def local_groups(self, keys: Sequence[str]) -> list[Group]:
        """Of these groups the ones in this rank's log. A rank that is alone must have all: KeyError."""
        if self.ranks.world > 1:
            stored = set(self.log.group_keys())
            keys = [key for key in keys if key in stored]
        return self.log.groups(keys)

    def count_engine_tokens(self, session: EngineSession) -> None:
        """Keep what the engine has generated so far; after its death it cannot be asked."""
        counters = session.counters()
        self.journal.count_tokens(counters["incarnation"], "engine", counters["tokens_generated"])

    def count_evaluation_tokens(self, session: EngineSession) -> None:
        """Tokens that were generated for no group: they go to the ledger's column "evaluation"."""
        self.journal.count_tokens(session.incarnation, "evaluation", session.take_ungrouped_tokens())


@contextmanager
def open_run(recipe: Recipe, ranks: Ranks) -> Iterator[Run]:
    """The run of a recipe, its directory locked while it lives. Raises ConfigError, also where another recipe ran or
    what the run stands on has changed; bad input leaves no directory behind."""
    directory, first = Path(recipe.run.dir), ranks.rank == 0
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        with name_disk_errors(directory), ExitStack() as stack:
            if first:
                stack.enter_context(_locked(directory))
            display = Display(recipe.schedule.steps, recipe.schedule.lag, silent=not first)
            stack.callback(display.close)
            path = _bind_on_all(directory, recipe, ranks, display)
            journal = Journal(directory / f"journal{ranks.suffix}.sqlite")
            stack.callback(journal.close)
            log = RolloutLog(directory / "rollouts" / f"rank{ranks.rank}.sqlite")
            stack.callback(log.close)
            yield Run(
                recipe=recipe,
                model=dataclasses.replace(recipe.model, path=path),
                directory=directory,
                ranks=ranks,
                log=log,
                journal=journal,
                display=display,
                stopwatch=Stopwatch(),
                version=max((version for version, _ in journal.versions()), default=0),
            )
    except ConfigError:
        if first and not (directory / "config.toml").exists():
            _remove_new(missing)
        raise


def _bind_on_all(directory: Path, recipe: Recipe, ranks: Ranks, display: Display) -> str:
    """Rank 0 looks before the others open anything: a model is converted once, and all stop for the same reason."""
    found = {}
    if ranks.rank == 0:
        try:
            found = {"model": _bind(directory, recipe, ranks.world, display)}
        except ConfigError as error:
            found = {"error": str(error)}
    found = ranks.broadcast(found)
    if "error" in found:
        raise ConfigError(found["error"])
    return str(found["model"])


def _bind(directory: Path, recipe: Recipe, world: int, display: Display) -> str:
    """The resolved model folder. The directory belongs to this recipe and contents from the first work done in it."""
    checkpoints = directory / "checkpoints"
    if checkpoints.is_dir() and any(checkpoints.iterdir()) and not (directory / "journal.sqlite").exists():
        raise ConfigError(
            f"run.dir = {directory} has checkpoints and no journal.sqlite, which says what they were trained on: "
            "restore it from a copy, or name a new --run.dir (its checkpoints load as model.path)"
        )
    model = resolve_model(recipe.model.path)
    contents = read_contents(recipe, model, world)
    stored = directory / "config.toml"
    try:
        if stored.exists():
            _check_same(_load_stored(stored), recipe, directory)
        check_contents(directory, recipe, contents, display.say)
    except ConfigError:
        if is_claimed(directory):
            raise
        clear_failed_start(directory)
    save_contents(directory, contents)
    return model


def _remove_new(folders: Sequence[Path]) -> None:
    """A run directory that this start made, and the parents that it made for it."""
    for folder in folders[:1]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in folders[1:]:
        with suppress(OSError):  # it holds something else by now
            folder.rmdir()


def save_recipe(run: Run) -> None:
    """Bind the directory to its recipe. Called when all input has proved good: a typo binds nothing."""
    replace_text(run.directory / "config.toml", tomli_w.dumps(to_toml(run.recipe)))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "ab")  # noqa: SIM115 (held until the process ends)
    except OSError as error:
        raise ConfigError(f"run.dir = {path}: {error.strerror}; name a directory you may write to") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"run.dir = {path}: another process runs there now; wait for it, or name another") from error
    with lock:
        yield


def _load_stored(path: Path) -> Recipe:
    try:
        return load_recipe(path)
    except ConfigError as error:
        raise ConfigError(
            f"run.dir = {path.parent} was written by another version of oapl-engine, which this one does not resume: "
            f"{error}; start in a new --run.dir (its checkpoints load as model.path)"
        ) from error


def _check_same(stored: Recipe, given: Recipe, path: Path) -> None:
    for section in dataclasses.fields(Recipe):
        old, new = getattr(stored, section.name), getattr(given, section.name)
        for field in dataclasses.fields(old):
            before, now = getattr(old, field.name), getattr(new, field.name)
            if before != now and (section.name, field.name) not in MAY_CHANGE_ON_RESUME:
                raise ConfigError(
                    f"run.dir = {path} belongs to another recipe: {section.name}.{field.name} was {before!r}, now "
                    f"{now!r}; name a new --run.dir, or repeat the old value to resume"
                )


def combine_handlers(*parts: dict[type, Handler]) -> dict[type, list[Handler]]:
    """Handlers by command. Where several parts handle one command, they do so in the order given."""
    combined: dict[type, list[Any]] = {}
    for part in parts:
        for command, handler in part.items():
            combined.setdefault(command, []).append(handler)
    return combined
