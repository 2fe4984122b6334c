"""SOURCES: every source of problems that a recipe's data.source may name. A new one is a file and a line here.

A source from elsewhere needs no line: data.source = "package.module:factory" names it. See docs/extending.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from oapl_engine.config import DataConfig
from oapl_engine.data.problem import Problem, Source
from oapl_engine.errors import ConfigError, load_object, naming_own_code, nearest


class SourceKind(NamedTuple):
    """How a source is made and what it needs.

    factory:   "module:function" of a `factory(data: DataConfig) -> Source`; None: it holds rollouts only
    reads:     fields of GIVEN that it reads
    requires:  of these the ones that must not be empty
    rollouts:  whether offline mode can read finished rollouts from it
    by_name:   field of [data] that NAME in `--task SOURCE:NAME` stands for; None: not to be had that way
    """

    factory: str | None
    reads: tuple[str, ...]
    requires: tuple[str, ...]
    rollouts: bool = False
    by_name: str | None = None


GIVEN = ("task", "path", "options")  # fields of [data] that say what a source holds; the others say how it is asked
TASK = ("task", "options")
SOURCES = {
    "micro": SourceKind("oapl_engine.data.micro:micro_source", TASK, ("task",), by_name="task"),
    "reasoning_gym": SourceKind("oapl_engine.data.reasoning:reasoning_source", TASK, ("task",), by_name="task"),
    "jsonl": SourceKind("oapl_engine.data.jsonl:jsonl_source", ("path",), ("path",), rollouts=True, by_name="path"),
    "parquet": SourceKind(None, ("path",), ("path",), rollouts=True),
    "hf": SourceKind("oapl_engine.data.hub:hub_source", TASK, ("task",), by_name="task"),
    "benchmark": SourceKind("oapl_engine.data.benchmarks:benchmark_source", (*TASK, "path"), ("task",)),
}


def check_source(data: DataConfig, generates: bool) -> None:
    """Raises ConfigError for an unknown source, or one that lacks a field or does not fit the mode. Reads no data.

    generates: whether the run has an engine, which needs problems; without one it needs finished rollouts
    """
    kind = _find(data.source)
    if data.source not in SOURCES:
        load_object(data.source, "data.source")
    for field in kind.requires:
        if not getattr(data, field):
            what = "reads a file" if field == "path" else "needs the name of a task"
            raise ConfigError(f'data.{field} is empty: data.source = "{data.source}" {what}')
    if not generates and not kind.rollouts:
        named = " or ".join(f'"{name}"' for name, other in SOURCES.items() if other.rollouts)
        raise ConfigError(f'data.source = "{data.source}": mode = "offline" reads rollouts from {named}')
    if generates and kind.factory is None:
        raise ConfigError(f'data.source = "{data.source}" holds finished rollouts: use schedule.mode = "offline"')


def unread_data_fields(source: str) -> tuple[str, ...]:
    """Fields of the recipe that a source would be given by and does not read; one of the user's own reads all."""
    kind = _find(source)
    return tuple(f"data.{field}" for field in GIVEN if source in SOURCES and field not in kind.reads)


def open_source(data: DataConfig) -> Source:
    """The problems that [data] names, before rendering. Raises ConfigError."""
    check_source(data, generates=True)
    factory = load_object(_find(data.source).factory or data.source, "data.source")
    with naming_own_code(f'data.source = "{data.source}" fails'):
        source = factory(data)
    if not isinstance(source, Source):
        raise ConfigError(
            f'data.source = "{data.source}" returned {type(source).__name__}: a factory returns data.problem.Source'
        )
    return (
        source if data.source in SOURCES else dataclasses.replace(source, problem=_checked_problem(data.source, source))
    )


def _checked_problem(name: str, source: Source) -> Callable[[int], Problem]:
    """source.problem of a user's own source; what it raises or returns by mistake is a ConfigError."""

    def problem(index: int) -> Problem:
        with naming_own_code(f'data.source = "{name}": problem({index}) fails'):
            found = source.problem(index)
        if not isinstance(found, Problem):
            raise ConfigError(f'data.source = "{name}": problem({index}) is {found!r:.80}, not a data.problem.Problem')
        return found

    return problem


def parse_source_task(task: str) -> dict[str, Any] | None:
    """Fields of [data] that "SOURCE:NAME" stands for; None where it is not written so."""
    source, colon, name = task.partition(":")
    field = SOURCES[source].by_name if source in SOURCES else None
    return {"source": source, field: name} if colon and field else None


def _find(source: str) -> SourceKind:
    if ":" in source:
        return SourceKind(source, (), ())
    if source not in SOURCES:
        hint = nearest(source, [*SOURCES, "package.module:factory"])
        raise ConfigError(f'data.source = "{source}" is not a source; {hint}')
    return SOURCES[source]
