"""The scheduler's state after a kill, from the logs and journals of all ranks."""

import dataclasses
import itertools
from collections.abc import Collection, Iterable

from oapl_engine.orchestrator.run import Run
from oapl_engine.report.metrics import read_evaluations
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.log import RolloutLog
from oapl_engine.scheduler.buffer import Buffer, BufferedGroup
from oapl_engine.scheduler.core import in_window
from oapl_engine.scheduler.state import Settings, State

UNTRAINABLE = ("cleared", "lost", "dropped:group_too_small", "dropped:resampled")  # columns of the ledger


def resume_state(run: Run, recorded: Collection[str] = ()) -> State:
    """The state in which the scheduler continues; a new run's is the same with nothing in it.

    run.step: of the checkpoint that was loaded. recorded: ids of groups whose value is known from recorded rewards.

    Steps that were begun after the checkpoint are replayed with the same groups; what the logs of all ranks hold beyond
    them waits. Rank 0's journal alone says what was consumed.
    """
    settings = Settings.from_recipe(run.recipe, engines=run.ranks.world)
    own = {
        "steps": [(step.step, step.groups) for step in run.journal.steps()],
        "versions": run.journal.versions(),
        "trainable": _trainable(run.log, run.journal, recorded),
    }
    all_ranks = run.ranks.gather(own)
    steps = [(number, tuple(groups)) for number, groups in all_ranks[0]["steps"]]
    versions = tuple((version, step) for version, step in all_ranks[0]["versions"])
    by_turn = itertools.zip_longest(*(rank["trainable"] for rank in all_ranks))
    trainable = [pair for turn in by_turn for pair in turn if pair]
    return State(
        settings,
        step=run.step,
        next_version=1 + max((version for version, _ in versions), default=-1),
        published_step=max((step for _, step in versions), default=0),
        version_steps=in_window(versions, settings.window),
        buffer=Buffer(_waiting(trainable, steps, settings.max_uses)),
        replay=tuple(groups for number, groups in steps if number > run.step),
        evaluated=max(read_evaluations(run.directory), default=-1),
        checkpointed=run.step,
    )


def _trainable(log: RolloutLog, journal: Journal, recorded: Collection[str]) -> list[tuple[str, int]]:
    """(id, version) of the log's groups that may be trained, in order of arrival: a value needs two rewards."""
    disposed = journal.dispositions()
    groups = map(log.group, log.group_keys())
    return [
        (group.id, group.version)
        for group in groups
        if sum(disposed.get(rollout.key) not in UNTRAINABLE for rollout in group.scored())
        >= (1 if group.id in recorded else 2)
    ]


def _waiting(
    trainable: list[tuple[str, int]], steps: list[tuple[int, tuple[str, ...]]], max_uses: int
) -> Iterable[BufferedGroup]:
    """The buffer after the journal's steps, in the order that an uninterrupted run would have it in."""
    waiting = {key: BufferedGroup(key, version) for key, version in trainable}
    for _, groups in steps:
        for used in [waiting.pop(key) for key in groups if key in waiting]:
            if used.uses + 1 < max_uses:
                waiting[used.key] = dataclasses.replace(used, uses=used.uses + 1)
    return waiting.values()
