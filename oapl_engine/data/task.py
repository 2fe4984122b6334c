"""A task: prompts to train on, in an order that is a pure function of (seed, position), and held-out prompts.

Held-out problems depend on [data] alone, not on the seed: runs with other seeds, and a warm start, are evaluated on the
same problems and none of them trains on one. A smaller data.held_out is the beginning of a larger one.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oapl_engine.config import DataConfig
from oapl_engine.data.problem import Problem, Source
from oapl_engine.data.render import Render, renderer
from oapl_engine.data.sources import open_source
from oapl_engine.errors import ConfigError
from oapl_engine.samples import Prompt

SPARE_BANKS = 100  # times a generated problem is replaced by a spare one before the task counts as exhausted


class Task:
    """Prompts of a source. `prompt(position)` for position = 0, 1, 2, …: a run resumes by keeping the next position.

    An epoch is `size` positions, each prompt id once; every epoch has its own order.

    source:    of its problems
    size:      positions per epoch
    held_out:  prompts of the held-out problems
    dropped:   prompt id to tokens, of the prompts over data.max_prompt_tokens met so far; all of them for a file

    Raises ConfigError where nothing is left to train on.
    """

    def __init__(self, source: Source, data: DataConfig, seed: int, render: Render) -> None:
        self.source = source
        self.dropped: dict[str, int] = {}
        self._data = data
        self._seed = seed
        self._render = render
        self.held_out, self._held_out_texts, self._first = self._hold_out()
        numbers = range(self._first, source.size) if source.finite else ()
        self._kept = [prompt for prompt in map(self._trainable, numbers) if prompt]
        self.size = len(self._kept) if source.finite else source.size - self._first
        if not self.size:
            raise self._nothing_left()

    def prompt(self, position: int) -> Prompt:
        """The prompt at a position of the order."""
        index = int(_order(self._seed, self.epoch(position), self.size)[position % self.size])
        return self._kept[index] if self.source.finite else self._generated(index)

    def epoch(self, position: int) -> int:
        return position // self.size

    def _generated(self, index: int) -> Prompt:
        """A spare problem keeps prompt ids unique within an epoch, which drawing again would not."""
        for bank in range(SPARE_BANKS):
            if prompt := self._trainable(self._first + index + bank * self.size):
                return prompt
        raise self._nothing_left()

    def _trainable(self, number: int) -> Prompt | None:
        problem = self.source.problem(number)
        return None if problem.text in self._held_out_texts else self._fit(problem)

    def _fit(self, problem: Problem) -> Prompt | None:
        """The problem rendered; None, and remembered as dropped, if it is too long."""
        ids = self._render(problem)
        if len(ids) <= self._data.max_prompt_tokens:
            return Prompt(problem.id, ids, self.source.name, problem.full_record)
        self.dropped[problem.id] = len(ids)
        return None

    def _hold_out(self) -> tuple[tuple[Prompt, ...], set[str], int]:
        """The first distinct questions that fit, their texts, and the number after the last one looked at."""
        prompts: list[Prompt] = []
        texts: set[str] = set()
        for index in range(self.source.size):
            if len(prompts) == self._data.held_out:
                return tuple(prompts), texts, index
            problem = self.source.problem(index)
            if problem.text not in texts and (prompt := self._fit(problem)):
                prompts.append(prompt)
                texts.add(problem.text)
        raise ConfigError(
            f"data.held_out = {self._data.held_out}: {self.source.name} has {len(prompts)} distinct problems that fit "
            "data.max_prompt_tokens, and some must be left to train on; lower held_out"
        )

    def _nothing_left(self) -> ConfigError:
        dropped = self.dropped
        longest = f" ({len(dropped)} dropped, up to {max(dropped.values())} tokens)" if dropped else ""
        return ConfigError(
            f"{self.source.name}: no problem left to train on with data.held_out = {self._data.held_out} and "
            f"data.max_prompt_tokens = {self._data.max_prompt_tokens}{longest}; lower held_out, raise "
            "max_prompt_tokens or choose a larger task"
        )


def load_task(data: DataConfig, seed: int, tokenizer: Any) -> Task:
    """The task that a recipe's [data] names, its order drawn by `seed`. Raises ConfigError on bad input."""
    return Task(open_source(data), data, seed, renderer(data, tokenizer))


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)
