"""Offline mode: the rollouts of a file become those of the run's log."""

from oapl_engine.errors import ConfigError
from oapl_engine.orchestrator.run import Run
from oapl_engine.rollout_log.interchange import Limits, read_rollouts
from oapl_engine.trainer.policy import Policy
from oapl_engine.trainer.selection import Recorded


def import_rollouts(run: Run, policy: Policy) -> Recorded:
    """Put this rank's share of the recipe's file into the log; returns the rewards that were recorded by group.

    Raises ConfigError for a file without what the recipe needs of it.
    """
    recipe, path = run.recipe, run.recipe.data.path
    limits = Limits(
        vocabulary=policy.vocabulary,
        max_new_tokens=recipe.sampling.max_new_tokens,
        stop_token_ids=tuple(recipe.sampling.stop_token_ids),
        group_size=recipe.schedule.group_size,
    )
    file = read_rollouts(path, limits, policy.tokenizer)
    if not file.has_behavior and recipe.objective.behavior == "engine":
        raise ConfigError(f'{path} has no behaviour log-probs: set objective.behavior = "recomputed"')
    schedule = recipe.schedule
    uses = schedule.steps * schedule.groups_per_step
    if uses > len(file.groups) * schedule.max_uses:
        raise ConfigError(
            f"schedule.steps = {schedule.steps} x groups_per_step = {schedule.groups_per_step} needs {uses} groups; "
            f"{path} has {len(file.groups)} and schedule.max_uses = {schedule.max_uses}: lower steps, or raise "
            "max_uses (epochs)"
        )
    stored = set(run.log.group_keys())
    for group in file.groups[run.ranks.rank :: run.ranks.world]:
        if group.id not in stored:
            run.log.append(group)
    run.display.say(f"{len(file.groups)} groups from {path}")
    return file.recorded_rewards
