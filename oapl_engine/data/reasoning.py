"""Problems of reasoning-gym by name, generated when asked for."""

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from oapl_engine.config import DataConfig
from oapl_engine.data.problem import Problem, Source, check_options
from oapl_engine.errors import ConfigError, nearest
from oapl_engine.reasoning_gym_import import create_data_set, encode_entry, reasoning_gym_registry

SIZE = 2**16  # problems per epoch, unless data.options.size says otherwise


def reasoning_source(data: DataConfig) -> Source:
    """Source of reasoning-gym data set data.task; data.options go to the data set's own config. Raises ConfigError.

    Two options are read here: `size`, problems per epoch, and `question`, the metadata field that stands for the
    question (chain_sum's "expression", say, for few-shot prompts; lists are joined by commas), default the question as
    worded by the data set.
    """
    task = data.task
    settings = {"seed": 0, "size": SIZE} | data.options
    field = settings.pop("question", "question")
    settings = json.loads(json.dumps(settings, default=str))
    dataset = _create(task, settings)

    def problem(index: int) -> Problem:
        try:
            with _global_random(index):
                entry = dataset[index]
        except IndexError as error:
            raise ConfigError(f"{task} has no problem {index}: raise data.options.size = {settings['size']}") from error
        record = {"dataset": task, "config": settings, "entry": encode_entry(entry)}
        return Problem(f"{task}-{index}", _question(task, field, entry), record)

    problem(0)
    return Source(task, settings["size"], problem, finite=False, verifier="reasoning_gym")


def _question(task: str, field: str, entry: dict[str, Any]) -> str:
    fields = entry["metadata"] | {"question": entry["question"]}
    if field not in fields:
        raise ConfigError(f'data.options.question = "{field}": {task} has no such field; {nearest(field, fields)}')
    value = fields[field]
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _create(task: str, settings: dict[str, Any]) -> Any:
    registry = reasoning_gym_registry()
    if task not in registry:
        raise ConfigError(f'data.task = "{task}" is not a reasoning-gym data set; {nearest(task, registry)}')
    if type(settings["size"]) is not int or settings["size"] < 1:
        raise ConfigError(f"data.options.size = {settings['size']!r}: problems per epoch, a whole number from 1")
    _, config = registry[task]
    check_options(settings, [*(f.name for f in dataclasses.fields(config)), "question"], task)
    try:
        return create_data_set(task, settings)
    except (AssertionError, ValueError, TypeError) as error:  # what the data sets raise on a bad config
        reason = str(error) or type(error).__name__
        raise ConfigError(f"data.options = {settings}: {task} refuses them: {reason}") from error


@contextlib.contextmanager
def _global_random(index: int) -> Iterator[None]:
    """Some data sets draw from Python's and numpy's global generators: a problem is a function of its number alone."""
    states = random.getstate(), np.random.get_state()
    random.seed(index)
    np.random.seed(index % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
