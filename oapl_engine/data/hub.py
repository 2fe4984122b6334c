"""Problems from a data set of the Hugging Face hub (package `datasets`, optional), with the fields of JSONL."""

from typing import Any

from oapl_engine.config import DataConfig
from oapl_engine.data.jsonl import finite_source, problems_of_rows
from oapl_engine.data.problem import Source, check_options
from oapl_engine.errors import ConfigError, nearest

OPTIONS = {"config": None, "split": "train", "revision": None, "question": "question", "answer": "answer"}
ALTERNATIVES = {"question": {"prompt"}, "answer": {"tests", "reward_model"}}  # what a row may have instead, see jsonl


def hub_source(data: DataConfig) -> Source:
    """Source of hub data set data.task. Options: config, split, revision, and the columns of question and answer.

    Raises ConfigError where `datasets` is not installed, the hub cannot be reached, or a column is missing.
    """
    task, options = data.task, data.options
    check_options(options, OPTIONS, 'source = "hf"')
    settings: dict[str, Any] = OPTIONS | options
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f'data.source = "hf" (task "{task}") needs the package datasets: pip install datasets, or export the '
            'problems to JSONL and use data.source = "jsonl"'
        ) from error
    try:
        table = datasets.load_dataset(task, settings["config"], split=settings["split"], revision=settings["revision"])
    except (OSError, ValueError) as error:  # offline, unknown name, unknown split: all are one of these two
        raise ConfigError(
            f'data.task = "{task}": the hub data set cannot be loaded: {error}; check the name and the network, or '
            'use data.source = "jsonl"'
        ) from error
    chosen = {field: column for field, column in settings.items() if field in ALTERNATIVES}
    for field, column in chosen.items():
        others = ALTERNATIVES[field] if column == field else set()
        if not {column, *others} & set(table.column_names):
            raise ConfigError(f'data.task = "{task}" has no column "{column}"; {nearest(column, table.column_names)}')
    rows = ((f"{task}, row {n}", n, _renamed(row, chosen)) for n, row in enumerate(table))
    return finite_source(task, problems_of_rows(rows, task.replace("/", "-")))


def _renamed(row: dict[str, Any], chosen: dict[str, str]) -> dict[str, Any]:
    """The row with the chosen columns under the names of their fields; another column of such a name is left out."""
    others = {name: value for name, value in row.items() if name not in (*chosen, *chosen.values())}
    return others | {field: row[column] for field, column in chosen.items() if column in row}
