"""Problems of reasoning-gym by name, generated when asked for."""

import dataclasses
import json
from typing import Any

from oapl_engine.config import DataConfig
from oapl_engine.data.problem import Problem, Source, check_options
from oapl_engine.errors import ConfigError, nearest
from oapl_engine.reasoning_gym_import import provide_pycosat

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
    dataset = _create(task, settings)

    def problem(index: int) -> Problem:
        try:
            entry = dataset[index]
        except IndexError as error:
            raise ConfigError(f"{task} has no problem {index}: raise data.options.size = {settings['size']}") from error
        record = {"dataset": task, "entry": json.loads(json.dumps(entry, default=str))}  # no tuples, no dates
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
    provide_pycosat()
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ConfigError(f'data.task = "{task}" is not a reasoning-gym data set; {nearest(task, DATASETS)}')
    if type(settings["size"]) is not int or settings["size"] < 1:
        raise ConfigError(f"data.options.size = {settings['size']!r}: problems per epoch, a whole number from 1")
    make, config = DATASETS[task]
    check_options(settings, [*(f.name for f in dataclasses.fields(config)), "question"], task)
    try:
        return make(config=config(**settings))
    except (AssertionError, ValueError, TypeError) as error:  # what the data sets raise on a bad config
        reason = str(error) or type(error).__name__
        raise ConfigError(f"data.options = {settings}: {task} refuses them: {reason}") from error
