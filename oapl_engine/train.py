"""`torchrun -m oapl_engine.train RECIPE`: opens a run and its handlers, and drives them until Exit.

Algorithm 1 (arXiv 2602.19362) is in scheduler/core.py: it decides, the handlers here carry out.
"""

import os
import queue
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

# Read when torch loads its OpenMP library: idle threads must not spin on the cores that engine and trainer share.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from oapl_engine.config import Recipe, load_recipe
from oapl_engine.distributed import join_ranks
from oapl_engine.errors import DIFFERENCE, OK, ConfigError, find_modules_in, guarded
from oapl_engine.evaluation.evaluate import compare, compare_rewards, read_problems
from oapl_engine.orchestrator.engine_events import EngineEvents
from oapl_engine.orchestrator.generation import open_generation, prepare_questions
from oapl_engine.orchestrator.learner import Learner
from oapl_engine.orchestrator.offline import log_rollouts, read_recipe_rollouts
from oapl_engine.orchestrator.preflight import check_names, check_recipe
from oapl_engine.orchestrator.resume import resume_state
from oapl_engine.orchestrator.run import combine_handlers, open_run, save_recipe
from oapl_engine.report.metrics import read_evaluations, read_metrics
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.driver import drive
from oapl_engine.scheduler.lockstep import lockstep_events
from oapl_engine.sft import make_missing_model


def train(path: str, overrides: list[str]) -> int:
    """Train by the recipe in a file, with `--section.field value` laid over it. Returns the exit code."""
    find_modules_in(Path.cwd(), Path(path).resolve().parent)
    recipe = load_recipe(path, overrides)
    check_recipe(recipe, overrides)
    make_missing_model(recipe.model.path, Path(path).parent)
    return run_recipe(recipe)


def run_recipe(recipe: Recipe) -> int:
    """Train by a recipe, or continue where a killed run stopped. Returns the exit code; raises ConfigError."""
    check_names(recipe)
    inbox: queue.SimpleQueue[e.Event] = queue.SimpleQueue()
    with ExitStack() as stack:
        run = stack.enter_context(open_run(recipe, join_ranks(recipe.rollout.tensor_parallel)))
        # what is asked or read comes before the weights, which take far longer to load
        questions = prepare_questions(run) if recipe.schedule.traits.generates else None
        file = None if questions else read_recipe_rollouts(run)
        events = EngineEvents(inbox, engine=run.ranks.rank)
        learner = Learner.open(run)
        handlers = [run.handlers()]
        stack.enter_context(stop_on_signal(inbox))
        if questions:
            if not recipe.schedule.traits.overlaps:
                learner.offload()  # vLLM sizes its cache from the memory that it finds free
            before, after = stack.enter_context(open_generation(run, questions, learner.policy, events))
            handlers += [*before, learner.handlers(), after]  # in this order for Checkpoint, OffloadTrainer
            events.ready()
        elif file:
            log_rollouts(run, file)
            learner.recorded_rewards = file.recorded_rewards
            handlers.append(learner.handlers())
            inbox.put(e.Start())
        state = resume_state(run, recorded=file.recorded_rewards if file else ())
        if run.ranks.rank == 0:
            save_recipe(run)
        record = run.directory / "events.jsonl" if run.ranks.rank == 0 else None
        lockstep = lockstep_events(run.ranks) if run.ranks.world > 1 else None
        state, code = drive(state, inbox, combine_handlers(*handlers), record, lockstep)
        events.raise_failure()
        untrained = learner.why_untrained() if code == OK else None
    if code == OK and run.ranks.rank == 0:
        print(summary(recipe, state.step), flush=True)
        if untrained:
            print(f"error: nothing was learned: {untrained}", file=sys.stderr)
    return DIFFERENCE if untrained else code


@contextmanager
def stop_on_signal(inbox: "queue.SimpleQueue[e.Event]") -> Iterator[None]:
    """Ctrl-C, SIGTERM and the end of the terminal ask for a clean checkpoint; a second one stops immediately. A signal
    that is ignored stays so: nohup."""

    def ask(number: int, _: object) -> None:
        inbox.put(e.Stop())
        signal.signal(number, signal.default_int_handler)
        with suppress(OSError):  # the same Ctrl-C ended what read our stderr, such as `tee`
            os.write(2, b"stopping after a checkpoint; once more stops immediately\n")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(recipe: Recipe, steps: int) -> str:
    """What was done and where it is; the last line is `done: steps=… pass@1 before=… after=… run=…`.

    Rewards outside 0 to 1 stand in it too, and the share of responses without a reward where there are any.
    """
    run = Path(recipe.run.dir)
    rows = read_evaluations(run)
    before, after = (f"{rows[step]['pass_at_k']:.4f}" if step in rows else "-" for step in (0, steps))
    lines = [f"model: {run / 'checkpoints' / f'step_{steps:06d}'}   metrics: {run / 'metrics.jsonl'}"]
    more = ""
    if {0, steps} <= rows.keys():
        found = {result.step: result for result in read_problems(run)}
        first, last = found[0], found[steps]
        (change, error), (gain, spread) = compare(first, last), compare_rewards(first, last)
        done = f"{steps} steps of {recipe.objective.name}, L = {recipe.schedule.lag}, seed {recipe.run.seed}"
        lines.insert(
            0,
            f"{done}: held-out pass@1 {change:+.4f} ± {error:.4f}, reward {gain:+.4f} ± {spread:.4f} (paired) on "
            f"{len(first.problems)} problems",
        )
        rewards = [result.mean_reward()[0] for result in (first, last)]
        if any(reward < 0 or reward > 1 for result in (first, last) for reward in result.reward):
            more = f"reward before={rewards[0]:.4f} after={rewards[1]:.4f} "
    for row in read_metrics(run / "metrics.jsonl")[-1:]:
        if row.get("reward/all/invalid"):
            more += f"invalid={row['reward/all/invalid']:.1%} "
    lines.append(f"done: steps={steps} pass@1 before={before} after={after} {more}run={recipe.run.dir}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Entry point under torchrun; `oapl train` is the same command."""

    def work() -> int:
        if not argv or argv[0].startswith("-"):
            raise ConfigError("usage: torchrun … -m oapl_engine.train RECIPE [--section.field VALUE …]")
        return train(argv[0], argv[1:])

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
