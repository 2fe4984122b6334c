"""EngineSession: one live engine with its collector and its scorer. Training, `oapl eval` and `oapl doctor` use it."""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from oapl_engine.config import Recipe, resolve_engine_dtype
from oapl_engine.inference.client import BlockingControl
from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.protocol import Sample, Sampling
from oapl_engine.inference.supervisor import Engine, EngineStartError
from oapl_engine.rewards import Verdict
from oapl_engine.rollout.collector import Collector, OnGroup
from oapl_engine.rollout.device_turn import DeviceTurn
from oapl_engine.rollout.scorer import Scorer, TokenIds
from oapl_engine.samples import Prompt

DRAIN_SECONDS = 60.0  # verdicts of samples that a dead engine had finished
MAX_RESTARTS = 3  # deaths in a row, without a trainable group in between, that end the run

ALONE, SHARED = 0.85, 0.4  # of a GPU, for an engine that takes turns there with the trainer, or that shares it


class EngineSession:
    """One engine process that this process owns, from start to close; a context manager.

    options, log_path:  of the engine (inference.supervisor.Engine)
    scorer:             verifies responses; None where no response is verified. close() closes it
    on_failure:         called with what a group's callback, a verifier or a restart raised, on another thread
    on_lost:            called when the engine died, before it is replaced; None: it is not replaced

    control:        EngineControl (weights.control) of the present engine process
    after_restart:  functions that are called in order once a new process is up; the last may announce it
    """

    def __init__(
        self,
        options: EngineOptions,
        log_path: Path,
        scorer: Scorer | None = None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.scorer = scorer
        self.after_restart: list[Callable[[], None]] = []
        self._on_failure = on_failure
        self._on_lost = on_lost
        self._deaths: queue.SimpleQueue[Engine | None] = queue.SimpleQueue()
        self._consecutive_deaths = 0
        self._ungrouped_tokens = 0
        self._closing = threading.Event()
        self._turn = DeviceTurn()
        self.engine = Engine(options, log_path, on_lost=self._deaths.put)
        self.collector = Collector(self.engine.client, scorer.verify if scorer else None, on_failure)
        self.control = BlockingControl(self.collector.call, lambda: self.collector.client)
        # One thread for the life of the session: an engine dies with the thread that started it (PR_SET_PDEATHSIG).
        threading.Thread(target=self._supervise, name="supervise-engine", daemon=True).start()

    @property
    def incarnation(self) -> int:
        """Of the present engine process; it grows by one with each restart."""
        return self.engine.options.incarnation

    def submit(self, prompt: Prompt, group_id: str, group_size: int, sampling: Sampling, on_group: OnGroup) -> None:
        """Generate and verify a group; returns immediately (Collector.submit)."""
        self.collector.submit(prompt, group_id, group_size, sampling, on_group)

    def generate(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[list[Sample]]:
        """n unverified samples per prompt, in order. Raises EngineLostError."""
        groups = self.collector.generate_many(prompts, n, sampling)
        self._ungrouped_tokens += sum(len(sample.ids()) for group in groups for sample in group)
        return groups

    def take_ungrouped_tokens(self) -> int:
        """Response tokens that generate() has returned since this was last called: they belong to no group."""
        tokens, self._ungrouped_tokens = self._ungrouped_tokens, 0
        return tokens

    def verify(self, pairs: Sequence[tuple[Prompt, TokenIds]]) -> list[Verdict]:
        """Verdicts on (prompt, response token ids) pairs, in order."""
        if self.scorer is None:
            raise RuntimeError("this session has no scorer: give EngineSession one")
        return self.scorer.verify_many(pairs)

    def sleep(self, tags: Sequence[str]) -> None:
        """Give the engine's device memory back (EngineClient.sleep). An engine that dies, or died, is replaced after
        allow_start(); one that is starting is waited for. Raises EngineLostError."""
        self._turn.give_to_trainer()
        self.collector.call(self.collector.client.sleep(tags))

    def allow_start(self) -> None:
        """The trainer has left the device: an engine that died since sleep() is replaced."""
        self._turn.give_to_engine()

    def wake(self, tags: Sequence[str]) -> None:
        """Take device memory again (EngineClient.wake)."""
        self.collector.call(self.collector.client.wake(tags))

    def counters(self) -> dict[str, Any]:
        """What the engine has done so far (EngineClient.counters)."""
        return self.collector.call(self.collector.client.counters())

    def confirm_healthy(self) -> None:
        """A trainable group arrived: earlier deaths no longer count towards MAX_RESTARTS."""
        self._consecutive_deaths = 0

    def close(self) -> None:
        """Stop collector, engine and verifiers, each whatever the others raise; nothing is left behind.

        The collector first: what is in flight is dropped, and not reported as lost or as not verified.
        """
        self._closing.set()
        self._turn.give_to_engine()
        self._deaths.put(None)
        with ExitStack() as stack:
            if self.scorer:
                stack.callback(self.scorer.close)
            stack.callback(self.engine.stop)
            self.collector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _supervise(self) -> None:
        """Replace an engine that died, until close()."""
        while (dead := self._deaths.get()) is not None:
            if self._on_lost is None:
                continue
            self._on_lost()
            try:
                self._replace(dead)
            except EngineStartError as error:
                self._on_failure(error)

    def _replace(self, dead: Engine) -> None:
        """Wait for what the dead engine had finished and for the engine's turn, then start a fresh process."""
        self._consecutive_deaths += 1
        self.collector.wait_until_idle(DRAIN_SECONDS)
        if self._consecutive_deaths > MAX_RESTARTS:
            raise EngineStartError(f"the engine died {self._consecutive_deaths} times in a row; see {dead.log_path}")
        with self._turn.engines():
            if self._closing.is_set():
                return
            dead.restart()
            self.collector.attach(dead.client)
            for announce in self.after_restart:
                announce()


def recipe_engine_options(recipe: Recipe, model: str, max_model_len: int, **others: Any) -> EngineOptions:
    """Options of a recipe's engine for the model in a folder. others: further fields of EngineOptions."""
    rollout = recipe.rollout
    return EngineOptions(
        model=model,
        dtype=resolve_engine_dtype(recipe),
        tensor_parallel=rollout.tensor_parallel,
        max_model_len=max_model_len,
        kv_cache_mb=rollout.kv_cache_mb,
        memory_share=rollout.memory_share or (SHARED if recipe.schedule.traits.overlaps else ALONE),
        **others,
    )


def engine_cores(recipe: Recipe) -> tuple[int, ...]:
    """CPU cores of an engine that overlaps with training: those beyond run.threads, which the trainer keeps.

    Empty: all of them.
    """
    cores, threads = sorted(os.sched_getaffinity(0)), recipe.run.threads
    apart = recipe.schedule.traits.overlaps and 0 < threads < len(cores) and not torch.cuda.is_available()
    return tuple(cores[threads:]) if apart and "WORLD_SIZE" not in os.environ else ()
