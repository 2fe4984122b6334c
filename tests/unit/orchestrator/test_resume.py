"""The scheduler's state after a kill: what was consumed is not trained again, what was not is not lost."""

from dataclasses import replace

import pytest

from oapl_engine.orchestrator.resume import resume_state
from tests.support.rollouts import plain_group


@pytest.fixture
def run(make_run):
    return make_run("--schedule.groups_per_step", 2)


def waiting(state):
    return [(group.key, group.uses) for group in state.buffer]


def fill(run, *numbers, version=0):
    for number in numbers:
        run.log.append(plain_group(number, version=version))


def keys(*numbers):
    return tuple(f"0.p{number}.0" for number in numbers)


def test_a_new_run_starts_with_nothing(run):
    state = resume_state(run)
    assert (state.step, state.next_version, state.version, state.published_step) == (0, 0, -1, 0)
    assert (waiting(state), state.replay, state.evaluated) == ([], (), -1)
    assert state.settings.groups_per_step == 2


def test_a_single_response_is_trained_where_its_value_is_known(run):
    """The paper's file has one response per row, and all rewards that were recorded for its prompt."""
    group = plain_group(1)
    run.log.append(replace(group, rollouts=group.rollouts[:1]))
    assert waiting(resume_state(run)) == []
    assert waiting(resume_state(run, recorded=[group.id])) == [(group.id, 0)]


def test_steps_after_the_checkpoint_are_replayed(run):
    """With the groups that they had, in order; what the log holds beyond them waits."""
    fill(run, 1, 2, 3, 4, 5)
    run.journal.published(0, 0, "aa", 0)
    run.journal.intent(1, 0, keys(1, 2))
    run.journal.done(1, 0, keys(1, 2), ["0.p1.0.0"], "bb")
    run.journal.intent(2, 0, keys(3, 4))
    run.step = 1  # of the checkpoint
    state = resume_state(run)
    assert state.replay == (keys(3, 4),)
    assert waiting(state) == [("0.p5.0", 0)]
    assert (state.step, state.checkpointed, state.next_version, state.published_step) == (1, 1, 1, 0)


def test_a_group_that_may_be_used_again_waits_with_its_uses(make_run):
    run = make_run("--schedule.groups_per_step", 2, "--schedule.max_uses", 2)
    fill(run, 1, 2, 3)
    run.journal.intent(1, 0, keys(1, 2))
    run.step = 1
    assert waiting(resume_state(run)) == [("0.p3.0", 0), ("0.p1.0", 1), ("0.p2.0", 1)]


@pytest.mark.parametrize("column", ["cleared", "lost", "dropped:group_too_small", "dropped:resampled"])
def test_groups_that_ended_do_not_wait(run, column):
    fill(run, 1, 2)
    run.journal.dispose({"0.p1.0.0": column})  # one rollout is left of two: no baseline
    assert waiting(resume_state(run)) == [("0.p2.0", 0)]


def test_a_group_without_two_rewards_does_not_wait(run):
    run.log.append(plain_group(1, status="invalid"))
    fill(run, 2)
    assert waiting(resume_state(run)) == [("0.p2.0", 0)]


def test_groups_of_all_ranks_wait_in_turn(run):
    """Rank 0's journal alone says what was consumed."""

    class Two:
        rank, world = 0, 2

        def gather(self, own):
            other = {"steps": [(9, ["0.p8.0"])], "versions": [[7, 70]], "trainable": [("0.p8.0", 0), ("0.p9.0", 0)]}
            return [own, other]

    fill(run, 1)
    run.ranks = Two()
    state = resume_state(run)
    assert waiting(state) == [("0.p1.0", 0), ("0.p8.0", 0), ("0.p9.0", 0)]
    assert (state.replay, state.next_version, state.settings.engines) == ((), 0, 2)
