"""The generating half of a run: carries out Submit, Pause, Resume, Sleep, Wake, Publish and Evaluate."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oapl_engine.config import Recipe
from oapl_engine.data.task import Task
from oapl_engine.inference.client import EngineLost
from oapl_engine.inference.collector import Collector
from oapl_engine.inference.protocol import Sampling
from oapl_engine.inference.supervisor import Engine, EngineOptions, EngineStartError, start_engine
from oapl_engine.learner import Learner
from oapl_engine.rewards import Verdict, VerifierPool
from oapl_engine.samples import Group, Prompt, group_key
from oapl_engine.scheduler import events as e

DRAIN_SECONDS = 60.0  # verdicts of samples that a dead engine had finished
RESTARTS = 3  # deaths in a row, without a group in between, that end the run


@dataclass(frozen=True)
class Attempt:
    """A prompt admitted at `position` of the order, for the attempt-th time."""

    prompt: Prompt
    position: int
    attempt: int

    def key(self, epoch: int) -> str:
        return group_key(epoch, self.prompt.id, self.attempt)


@dataclass
class Generator:
    """The engine, its collector and the prompts. Events go to `inbox`; a group is durable before it counts."""

    recipe: Recipe
    run_dir: Path
    learner: Learner
    task: Task
    pool: VerifierPool
    inbox: queue.SimpleQueue[e.Event]
    position: int
    logged: frozenset[str]
    incarnation: int
    retries: list[Attempt] = field(default_factory=list)
    in_flight: dict[str, Attempt] = field(default_factory=dict)
    deaths: int = 0
    since: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    failure: BaseException | None = None

    def start(self, model_dir: Path) -> None:
        """Start the engine on the weights in model_dir; EngineReady follows in the inbox."""
        options = self._engine_options(model_dir)
        self.learner.display.show_phase("start", "engine (vLLM)")
        self.engine = start_engine(options, self.run_dir / "engine.log", on_lost=self._on_lost)
        self.collector = Collector(self.engine.client, self._verify, self._on_group, self._on_failure)
        self.inbox.put(e.EngineReady(0))

    def _engine_options(self, model_dir: Path) -> EngineOptions:
        r = self.recipe
        return EngineOptions(
            model=str(model_dir),
            dtype=r.model.dtype if r.rollout.engine_dtype == "auto" else r.rollout.engine_dtype,
            tensor_parallel=r.rollout.tensor_parallel,
            max_model_len=r.data.max_prompt_tokens + r.sampling.max_new_tokens,
            kv_cache_mb=r.rollout.kv_cache_mb,
            memory_share=r.rollout.memory_share,
            seed=r.run.seed + self.incarnation,
            incarnation=self.incarnation,
        )

    def close(self) -> None:
        """Stop engine, collector and verifiers; nothing is left behind."""
        for part in ("engine", "collector"):
            if hasattr(self, part):
                getattr(self, part).stop() if part == "engine" else self.collector.close()
        self.pool.close()

    def handlers(self) -> dict[type, Any]:
        return {
            e.Submit: self.submit,
            e.Pause: lambda c: self._answered(self.engine.client.pause(c.mode), None),
            e.Resume: lambda _: self._answered(self.engine.client.resume(), None),
            e.Sleep: self.sleep,
            e.Wake: self.wake,
            e.Publish: self.publish,
            e.Evaluate: self.evaluate,
        }

    def submit(self, command: e.Submit) -> None:
        """Admit prompts: those that a dead engine lost first, then the next of the order."""
        self.since = time.monotonic()
        for _ in range(command.n):
            attempt = self._next_attempt()
            key = attempt.key(self.task.epoch(attempt.position))
            with self.lock:
                self.in_flight[key] = attempt
            self.collector.submit(attempt.prompt, key, self.recipe.schedule.group_size, self._sampling())
        self._show_progress()

    def _next_attempt(self) -> Attempt:
        with self.lock:
            if self.retries:
                return self.retries.pop(0)
        while True:
            prompt = self.task.prompt(self.position)
            attempt = Attempt(prompt, self.position, 0)
            self.position += 1
            # A resumed run meets prompts that were generated after the checkpoint; their groups are in the log.
            if attempt.key(self.task.epoch(attempt.position)) not in self.logged:
                return attempt

    def _sampling(self) -> Sampling:
        s = self.recipe.sampling
        return Sampling(s.temperature, s.top_p, s.top_k, s.max_new_tokens, tuple(s.stop_token_ids))

    def _verify(self, prompt: Prompt, response: NDArray[np.int32]) -> Awaitable[Verdict]:
        r = self.recipe.reward
        text = self.learner.policy.tokenizer.decode(response.tolist(), skip_special_tokens=True)
        return self.pool.verify(
            r.name or self.task.verifier, text, prompt.record, {**self.task.verifier_options, **r.options}
        )

    def _on_group(self, group: Group) -> None:
        """On the collector's thread: make the group durable, then tell the scheduler."""
        self.learner.log.append(group)
        scored = group.scored()
        with self.lock:
            attempt = self.in_flight.pop(group.id)
            if not self.in_flight:
                self.learner.stopwatch.add("generate", time.monotonic() - self.since)
            lost = any(r.status == "lost" for r in group.rollouts)
            if lost and attempt.attempt == 0:  # once: a prompt that kills engines must not kill them all
                self.retries.append(Attempt(attempt.prompt, attempt.position, attempt.attempt + 1))
        if lost:
            self.learner.journal.dispose([r.key for r in scored], "lost")
        elif len(scored) < 2:
            self.learner.journal.dispose([r.key for r in scored], "dropped:group_too_small")
            self.inbox.put(e.GroupInvalid(group.id, f"{len(scored)} of {len(group.rollouts)} rollouts scored"))
        else:
            self.deaths = 0
            tokens = sum(r.response_tokens for r in group.rollouts)
            self.inbox.put(e.GroupDone(group.id, tokens, group.version))
        self._show_progress()

    def _show_progress(self) -> None:
        with self.lock:
            waiting = len(self.in_flight)
        self.learner.display.show_phase("generate", f"{waiting} groups to go" if waiting else "done")

    def _on_failure(self, error: BaseException) -> None:
        self.failure = error
        self.inbox.put(e.Stop(now=True))

    def _on_lost(self, engine: Engine) -> None:
        """On the watcher's thread: account for what was in flight, start a fresh process, say both to the scheduler."""
        until = time.monotonic() + DRAIN_SECONDS
        while self.in_flight and time.monotonic() < until:
            time.sleep(0.05)
        self.deaths += 1
        self.learner.display.say(f"engine incarnation {engine.options.incarnation} died; see {engine.log_path}")
        self.inbox.put(e.EngineLost(0))
        if self.deaths > RESTARTS:
            self._on_failure(EngineStartError(f"the engine died {self.deaths} times in a row; see {engine.log_path}"))
            return
        try:
            engine.restart()
        except EngineStartError as error:
            self._on_failure(error)
            return
        self.collector.attach(engine.client)
        self.inbox.put(e.EngineReady(0))

    def sleep(self, command: e.Sleep) -> e.Slept | None:
        return self._answered(self.engine.client.sleep(command.tags), e.Slept())

    def wake(self, command: e.Wake) -> e.Awake | None:
        awake = e.Awake() if "weights" in command.tags else None  # the KV cache follows; nobody waits for it
        return self._answered(self.engine.client.wake(command.tags), awake)

    def _answered(self, coroutine: Any, event: Any) -> Any:
        """The event, or None where the engine died: EngineLost comes from the watcher."""
        try:
            self.collector.call(coroutine)
        except EngineLost:
            return None
        return event
