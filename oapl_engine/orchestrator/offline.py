"""Offline mode: the rollouts of a file become those of the run's log."""

from oapl_engine.errors import ConfigError
from oapl_engine.orchestrator.run import Run
from oapl_engine.rollout_log.interchange import Limits, RolloutFile, read_rollouts
from oapl_engine.text import describe_dialogue, end_token_ids
from oapl_engine.trainer.loading import load_tokenizer, read_text_config


def read_recipe_rollouts(run: Run) -> RolloutFile:
    """The rollouts of the recipe's file, checked, before any weights are loaded. Raises ConfigError for a file without
    what the recipe needs of it."""
    recipe, path = run.recipe, run.recipe.data.path
    tokenizer = load_tokenizer(run.model.path)
    limits = Limits(
        vocabulary=read_text_config(run.model.path)["vocab_size"],
        max_new_tokens=recipe.sampling.max_new_tokens,
        ends=end_token_ids(run.model.path, tokenizer, recipe.sampling.stop_token_ids),
        group_size=recipe.schedule.group_size,
        system=recipe.data.system,
    )
    file = read_rollouts(path, limits, tokenizer)
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
    run.display.say(f"{len(file.groups)} groups from {path}")
    for line in describe_dialogue(tokenizer, file.groups[0].prompt.token_ids, limits.ends):
        run.display.say(line)
    return file


def log_rollouts(run: Run, file: RolloutFile) -> None:
    """Put this rank's share of the groups into the log."""
    stored = set(run.log.group_keys())
    for group in file.groups[run.ranks.rank :: run.ranks.world]:
        if group.id not in stored:
            run.log.append(group)
