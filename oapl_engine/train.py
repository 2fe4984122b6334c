"""`torchrun -m oapl_engine.train RECIPE`: wires the rooms and carries out the scheduler's commands until Exit."""

import os
import queue
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from oapl_engine.config import Recipe
from oapl_engine.data.model_folder import resolve_model
from oapl_engine.distributed import join_ranks
from oapl_engine.evaluation.evaluate import compare, read_problems
from oapl_engine.orchestrator.generator import open_generator
from oapl_engine.orchestrator.learner import open_learner
from oapl_engine.orchestrator.run_directory import open_run, resume_state, save_recipe
from oapl_engine.report.display import Display
from oapl_engine.report.metrics import read_evaluations
from oapl_engine.scheduler import driver
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.core import settings_of
from oapl_engine.scheduler.lockstep import listener


def run_recipe(recipe: Recipe) -> int:
    """Train by a recipe, or go on where a killed run stopped. Returns the exit code; raises ConfigError."""
    inbox: queue.SimpleQueue[e.Event] = queue.SimpleQueue()
    ranks = join_ranks()
    first = ranks.rank == 0
    with ExitStack() as rooms:
        run_dir = rooms.enter_context(open_run(recipe)) if first else Path(recipe.run.dir)
        path = ranks.broadcast(resolve_model(recipe.model.path) if first else None)  # made once, used by all
        display = Display(recipe.schedule.steps, recipe.schedule.lag, silent=not first)
        rooms.callback(display.close)
        learner = open_learner(recipe, replace(recipe.model, path=path), run_dir, display, ranks)
        rooms.callback(learner.journal.close)
        rooms.callback(learner.log.close)
        handlers, generator = learner.handlers(), None
        rooms.enter_context(stop_on_signal(inbox))
        if recipe.schedule.mode == "offline":
            learner.import_rollouts()
            inbox.put(e.Tick(0))
        else:
            generator = rooms.enter_context(open_generator(learner, inbox))
            handlers |= generator.handlers()
        evaluated = max(read_evaluations(run_dir), default=-1)
        settings = settings_of(recipe, engines=ranks.world)
        state = resume_state(settings, learner.step, learner.log, learner.journal, evaluated, ranks)
        if first:
            save_recipe(recipe, run_dir)
        record = run_dir / "events.jsonl" if first else None
        state, code = driver.drive(state, inbox, handlers, record, listener(ranks) if ranks.world > 1 else None)
        if generator and generator.failure:
            raise generator.failure
    if code == 0 and first:
        print(summary(recipe, state.step), flush=True)
    return code


@contextmanager
def stop_on_signal(inbox: queue.SimpleQueue[e.Event]) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a clean checkpoint; a second one stops at once."""

    def ask(number: int, _: object) -> None:
        inbox.put(e.Stop())
        os.write(2, b"stopping after a checkpoint; once more stops at once\n")
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(recipe: Recipe, steps: int) -> str:
    """What was done and where it lies; the last line is `done: steps=… pass@1 before=… after=… run=…`."""
    run = Path(recipe.run.dir)
    rows = read_evaluations(run)
    before, after = (f"{rows[s]['pass_at_k']:.4f}" if s in rows else "-" for s in (0, steps))
    lines = [f"model: {run / 'checkpoints' / f'step_{steps:06d}'}   metrics: {run / 'metrics.jsonl'}"]
    if {0, steps} <= rows.keys():
        found = {result.step: result for result in read_problems(run)}
        change, error = compare(found[0], found[steps])
        done = f"{steps} steps of {recipe.objective.name}, L = {recipe.schedule.lag}, seed {recipe.run.seed}"
        difference = f"held-out pass@1 {change:+.4f} ± {error:.4f} (paired) on {len(found[0].problems)} problems"
        lines.insert(0, f"{done}: {difference}")
    return "\n".join([*lines, f"done: steps={steps} pass@1 before={before} after={after} run={recipe.run.dir}"])


if __name__ == "__main__":
    from oapl_engine.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
