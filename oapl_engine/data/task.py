"""A task: prompts to train on, in an order that is a pure function of (seed, position), and held-out prompts.

Held-out problems depend on [data] alone, not on the seed: runs with other seeds, and a warm start, are evaluated on the
same problems and none of them trains on one. A smaller data.held_out is the beginning of a larger one.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oapl_engine.config import DataConfig
from oapl_engine.data.benchmarks import benchmark_source
from oapl_engine.data.hub import hub_source
from oapl_engine.data.jsonl import jsonl_source
from oapl_engine.data.micro import micro_source
from oapl_engine.data.problem import Problem, Source
from oapl_engine.data.reasoning import reasoning_source
from oapl_engine.data.render import Render, renderer
from oapl_engine.errors import ConfigError
from oapl_engine.samples import Prompt

SPARE_BANKS = 100  # times a generated problem is replaced by a spare one before the task counts as exhausted


@dataclass(frozen=True)
class Task:
    """`prompt(position)` for position = 0, 1, 2, …: a run resumes by keeping the next position.

    An epoch is `size` positions, each prompt id once; every epoch has its own order.
    verifier, verifier_options: how the source's answers are scored unless the recipe says otherwise.
    dropped: prompt id → tokens of the prompts over data.max_prompt_tokens met so far; all of them for a file.
    """

    name: str
    size: int
    held_out: tuple[Prompt, ...]
    verifier: str
    verifier_options: dict[str, Any]
    dropped: dict[str, int]
    prompt: Callable[[int], Prompt]

    def epoch(self, position: int) -> int:
        return position // self.size


def load_task(data: DataConfig, seed: int, tokenizer: Any) -> Task:
    """The task that a recipe's [data] names, its order drawn by `seed`. Raises ConfigError on bad input."""
    return build_task(open_source(data), data, seed, renderer(data, tokenizer))


def open_source(data: DataConfig) -> Source:
    """The problems that [data] names, before rendering. Raises ConfigError."""
    if data.source == "micro":
        return micro_source(data.task, data.options)
    if data.source == "reasoning_gym":
        return reasoning_source(data.task, data.options)
    if data.source == "jsonl":
        return jsonl_source(data.path, data.options)
    if data.source == "benchmark":
        return benchmark_source(data.task, data.path, data.options)
    if data.source == "hf":
        return hub_source(data.task, data.options)
    raise ConfigError(f'data.source = "{data.source}" holds finished rollouts, no prompts: use mode = "offline"')


def build_task(source: Source, data: DataConfig, seed: int, render: Render) -> Task:
    """Task over a source: held-out problems first, then everything else in shuffled order."""
    dropped: dict[str, int] = {}

    def fit(problem: Problem) -> Prompt | None:
        ids = render(problem.question)
        if len(ids) <= data.max_prompt_tokens:
            return Prompt(problem.id, ids, source.name, problem.record)
        dropped[problem.id] = len(ids)
        return None

    held_out, texts, first = _held_out(source, data.held_out, fit)

    def trained(number: int) -> Prompt | None:
        problem = source.problem(number)
        return None if problem.question in texts else fit(problem)

    kept = [prompt for prompt in map(trained, range(first, source.size)) if prompt] if source.finite else []
    size = len(kept) if source.finite else source.size - first
    if not size:
        raise _nothing_left(source.name, data, dropped)

    def generated(index: int) -> Prompt:
        # a spare problem keeps prompt ids unique within an epoch, which drawing again would not
        for bank in range(SPARE_BANKS):
            if prompt := trained(first + index + bank * size):
                return prompt
        raise _nothing_left(source.name, data, dropped)

    def prompt(position: int) -> Prompt:
        index = int(_order(seed, position // size, size)[position % size])
        return kept[index] if source.finite else generated(index)

    return Task(source.name, size, held_out, source.verifier, source.verifier_options, dropped, prompt)


def _nothing_left(name: str, data: DataConfig, dropped: dict[str, int]) -> ConfigError:
    longest = f" ({len(dropped)} dropped, up to {max(dropped.values())} tokens)" if dropped else ""
    return ConfigError(
        f"{name}: no problem left to train on with data.held_out = {data.held_out} and data.max_prompt_tokens = "
        f"{data.max_prompt_tokens}{longest}; lower held_out, raise max_prompt_tokens or choose a larger task"
    )


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)


def _held_out(
    source: Source, wanted: int, fit: Callable[[Problem], Prompt | None]
) -> tuple[tuple[Prompt, ...], set[str], int]:
    """The first `wanted` distinct questions that fit, their texts, and the number after the last one looked at."""
    prompts: list[Prompt] = []
    texts: set[str] = set()
    for index in range(source.size):
        if len(prompts) == wanted:
            return tuple(prompts), texts, index
        problem = source.problem(index)
        if problem.question not in texts and (prompt := fit(problem)):
            prompts.append(prompt)
            texts.add(problem.question)
    raise ConfigError(
        f"data.held_out = {wanted}: {source.name} has {len(prompts)} distinct problems that fit "
        "data.max_prompt_tokens, and some must be left to train on; lower held_out"
    )
