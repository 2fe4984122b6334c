"""What can be checked of a recipe before a model is loaded: names, packages, data, and the reward on one problem."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from oapl_engine.config import Recipe, check_unread
from oapl_engine.data.problem import Source
from oapl_engine.data.sources import check_source, open_source, unread_data_fields
from oapl_engine.errors import ConfigError
from oapl_engine.rewards.verdict import check_verifier
from oapl_engine.rollout.scorer import check_records, check_reward, reward_of
from oapl_engine.trainer.objective import make_objective, unread_fields
from oapl_engine.weights.transports import check_transport


def check_recipe(recipe: Recipe, overrides: Sequence[str] = ()) -> None:
    """Raises ConfigError for everything that is wrong without a look at the model; quickest first.

    overrides: words of the command line that are in the recipe already
    """
    check_names(recipe)
    check_fields_are_read(recipe, overrides)
    check_packages(recipe)
    if recipe.schedule.traits.generates:
        source = open_source(recipe.data)
        _check_held_out(recipe, source)
        name, options = reward_of(recipe.reward, source.verifier, source.verifier_options)
        if source.finite:
            check_records(name, options, [source.problem(number) for number in range(source.size)])
        problem = source.problem(0)
        check_reward(recipe.reward, name, options, problem.id, problem.full_record)
    elif not Path(recipe.data.path).is_file():
        raise ConfigError(f"data.path = {recipe.data.path} is not a file: name one with finished rollouts")


def check_names(recipe: Recipe) -> None:
    """Raises ConfigError for a source, verifier, objective or transport that is missing. Reads no data."""
    generates = recipe.schedule.traits.generates
    check_source(recipe.data, generates)
    make_objective(recipe.objective, recipe.objective.beta2)
    if generates:
        check_transport(recipe.weights.transport)
        if recipe.reward.name:
            check_verifier(recipe.reward.name, recipe.reward.options)


def check_fields_are_read(recipe: Recipe, overrides: Sequence[str] = ()) -> None:
    """Raises ConfigError for a field that the named source, mode or objective does not read.

    overrides: words of the command line that are in the recipe already
    """
    check_unread(recipe, "data.source", unread_data_fields(recipe.data.source), overrides)
    check_unread(recipe, "schedule.mode", recipe.schedule.traits.unread, overrides)
    check_unread(recipe, "objective.name", unread_fields(recipe.objective), overrides)


def check_packages(recipe: Recipe) -> None:
    """Raises ConfigError for a package that the recipe needs and that is not installed."""
    needs = {"tensorboard": recipe.report.tensorboard, "wandb": bool(recipe.report.wandb)}
    for package, wanted in needs.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"report.{package} needs the package {package}: pip install {package}")


def _check_held_out(recipe: Recipe, source: Source) -> None:
    """A rough check; the exact one needs the tokenizer."""
    if source.finite and recipe.data.held_out >= source.size:
        raise ConfigError(
            f"data.held_out = {recipe.data.held_out}: {source.name} has {source.size} problems, and some must be left "
            "to train on; lower held_out"
        )
