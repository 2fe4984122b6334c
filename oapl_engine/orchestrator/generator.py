"""The generating half of a run: carries out Submit, Pause, Resume, Sleep, Wake, Publish and Evaluate."""

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from oapl_engine.config import Recipe
from oapl_engine.data.task import Task, load_task
from oapl_engine.errors import ConfigError, RunError
from oapl_engine.evaluation.evaluate import append_evaluation, evaluate
from oapl_engine.inference.client import EngineLost
from oapl_engine.inference.protocol import Sample, Sampling
from oapl_engine.inference.supervisor import Engine, EngineStartError, engine_options
from oapl_engine.orchestrator.learner import Learner
from oapl_engine.rewards import Verdict, VerifierPool
from oapl_engine.rewards.verdict import check_verifier
from oapl_engine.rollout.collector import Collector
from oapl_engine.samples import Group, Prompt, group_key, make_rollout
from oapl_engine.scheduler import events as e
from oapl_engine.trainer.policy import published_weights
from oapl_engine.weights.attest import TOLERANCE, Golden, WeightMismatchError
from oapl_engine.weights.publish import Publisher
from oapl_engine.weights.transports import Buckets, check_transport, make_buckets

DRAIN_SECONDS = 60.0  # verdicts of samples that a dead engine had finished
RESTARTS = 3  # deaths in a row, without a group in between, that end the run


@contextlib.contextmanager
def open_generator(learner: Learner, inbox: queue.SimpleQueue[e.Event]) -> Iterator["Generator"]:
    """Task, verifiers and a running engine for a learner's recipe; all of it is gone on exit."""
    recipe = learner.recipe
    try:
        check_transport(recipe.weights.transport)
    except ValueError as error:
        raise ConfigError(f"weights.{error}") from error
    context = context_length(learner)
    data = replace(recipe.data, max_prompt_tokens=context - recipe.sampling.max_new_tokens)
    task = load_task(data, recipe.run.seed, learner.policy.tokenizer)
    held_out = task.held_out
    if recipe.evaluation.task:
        other = replace(data, task=recipe.evaluation.task)
        held_out = load_task(other, recipe.run.seed, learner.policy.tokenizer).held_out
    name, options = recipe.reward.name or task.verifier, {**task.verifier_options, **recipe.reward.options}
    check_verifier(name, options)
    pool = VerifierPool(recipe.reward.workers, recipe.reward.timeout_seconds, recipe.reward.memory_mb)
    generator = Generator(
        *(learner, task, held_out, context, name, options, pool, inbox, learner.position),
        logged=frozenset(learner.log.group_keys()),
        incarnation=learner.journal.incarnations(),
    )
    learner.first_unfinished = generator.first_unfinished
    if recipe.schedule.mode != "async":
        learner.leave_device()  # vLLM sizes its cache from the memory that it finds free
    try:
        generator.start()
        yield generator
    finally:
        generator.close()
        list_dropped(task, data.max_prompt_tokens, learner)


def list_dropped(task: Task, limit: int, learner: Learner) -> None:
    """Say how many prompts were over the limit, and keep their ids and lengths in dropped_prompts.json."""
    if task.dropped:
        path = learner.run_dir / "dropped_prompts.json"
        path.write_text(json.dumps(task.dropped, indent=1) + "\n")
        learner.display.say(f"{len(task.dropped)} prompts over data.max_prompt_tokens = {limit} were left out: {path}")


def context_length(learner: Learner) -> int:
    """Tokens of prompt and response: what the recipe asks for, or the positions of the model if fewer. ConfigError."""
    data, sampling = learner.recipe.data, learner.recipe.sampling
    wanted = data.max_prompt_tokens + sampling.max_new_tokens
    positions = getattr(learner.policy.model.config.get_text_config(), "max_position_embeddings", None) or wanted
    if sampling.max_new_tokens >= positions:
        raise ConfigError(
            f"sampling.max_new_tokens = {sampling.max_new_tokens}: {learner.model.path} has {positions} positions for "
            "prompt and response together; lower it"
        )
    return min(wanted, positions)


def engine_cores(recipe: Recipe) -> tuple[int, ...]:
    """CPU cores of the engine: in async mode those beyond run.threads, which the trainer keeps; empty: all of them."""
    cores, threads = sorted(os.sched_getaffinity(0)), recipe.run.threads
    apart = recipe.schedule.mode == "async" and 0 < threads < len(cores) and not torch.cuda.is_available()
    return tuple(cores[threads:]) if apart and "WORLD_SIZE" not in os.environ else ()


@dataclass(frozen=True)
class Attempt:
    """A prompt admitted at `position` of the order, for the attempt-th time, to engine `incarnation`."""

    prompt: Prompt
    position: int
    attempt: int
    incarnation: int = 0

    def key(self, epoch: int) -> str:
        return group_key(epoch, self.prompt.id, self.attempt)


@dataclass
class Generator:
    """The engine, its collector and the prompts. Events go to `inbox`; a group is durable before it counts."""

    learner: Learner
    task: Task
    held_out: tuple[Prompt, ...]
    context: int
    verifier: str
    verifier_options: dict[str, Any]
    pool: VerifierPool
    inbox: queue.SimpleQueue[e.Event]
    position: int
    logged: frozenset[str]
    incarnation: int
    retries: list[Attempt] = field(default_factory=list)
    in_flight: dict[str, Attempt] = field(default_factory=dict)
    deaths: int = 0
    dealt: int = 0
    said_lost: int = -1
    golden: list[NDArray[np.float32]] | None = None
    deaths_seen: queue.SimpleQueue[Engine | None] = field(default_factory=queue.SimpleQueue)
    since: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    failure: BaseException | None = None

    @property
    def recipe(self) -> Recipe:
        return self.learner.recipe

    @property
    def rank(self) -> int:
        return self.learner.ranks.rank

    def start(self) -> None:
        """Start the engine on the start model's weights; EngineReady follows in the inbox."""
        options = engine_options(
            self.recipe,
            self.learner.model.path,
            self.context,
            cores=engine_cores(self.recipe),
            seed=self.recipe.run.seed + self.incarnation,
            incarnation=self.incarnation,
            version=-1,  # the weights of the model folder are no version of this run until one is published
        )
        self.learner.display.show_phase("start", "engine (vLLM)")
        log = self.learner.run_dir / f"engine{self.learner.ranks.suffix}.log"
        self.engine = Engine(options, log, on_lost=self._on_lost)
        threading.Thread(target=self._keep_engine, name="keep-engine", daemon=True).start()
        self.collector = Collector(self.engine.client, self._verify, self._on_group, self._on_failure)
        self.publisher = self._publisher()
        self.inbox.put(e.EngineReady(self.rank))

    def _publisher(self) -> Publisher:
        """Publishes the policy's weights; what happens to generation meanwhile is the scheduler's Pause and Resume."""
        dtype = self.engine.options.dtype
        policy, probe = self.learner.policy, self._probe()
        rounds = (
            "bfloat16" if policy.matmul_dtype == torch.bfloat16 else dtype
        )  # either side's rounding is a difference

        def remember() -> None:
            self.golden = self._probe_logprobs(probe)

        self.learner.before_offload = remember  # on its device; a publish finds the policy on the host

        def control(phase: str, payload: dict[str, Any]) -> Any:
            if phase in ("pause", "resume"):
                return {}
            return self.collector.call(self.engine.client.control(phase, payload))

        return Publisher(
            lambda: published_weights(policy),
            control,
            bucket_bytes=self.recipe.weights.bucket_mb << 20,
            dtype=getattr(torch, dtype),
            golden=Golden(probe, lambda _: self.golden or self._probe_logprobs(probe), TOLERANCE[rounds]),
            make_buckets=self._make_buckets,
        )

    def _make_buckets(self, size: int) -> Buckets:
        transport, folder = self.recipe.weights.transport, self.learner.run_dir / "weights"
        return make_buckets(transport, size, folder, self.recipe.rollout.tensor_parallel)

    def _probe(self) -> list[list[int]]:
        """Token ids of the fixed probe set: prompts and a response of the start model to each; kept for resumes."""
        path = self.learner.run_dir / f"probe{self.learner.ranks.suffix}.json"
        if not path.exists():
            prompts = [self.task.prompt(i) for i in range(self.recipe.weights.golden_prompts)]
            samples = self.collector.generate_many(prompts, 1, self._sampling())
            pairs = zip(prompts, samples, strict=True)
            self._count_evaluation(s for group in samples for s in group)
            probe = [[*p.token_ids.tolist(), *s[0].ids().tolist()] for p, s in pairs]
            path.write_text(json.dumps(probe))
        found: list[list[int]] = json.loads(path.read_text())
        return found

    def _probe_logprobs(self, probe: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """The trainer's log-probs [len - 1] of each sequence at temperature 1."""
        groups = [_as_group(i, np.asarray(ids, np.int32)) for i, ids in enumerate(probe)]
        logprobs = self.learner.score(groups, 1.0)
        return [logprobs[f"probe.{i}.0"] for i in range(len(groups))]

    def close(self) -> None:
        """Stop engine, collector, publisher and verifiers; nothing is left behind."""
        self.deaths_seen.put(None)
        self.pool.close()
        if hasattr(self, "publisher"):
            self.publisher.close()
        if hasattr(self, "engine"):
            self.engine.stop()
        if hasattr(self, "collector"):
            self.collector.close()

    def handlers(self) -> dict[type, Any]:
        return {
            e.Submit: self.submit,
            e.Pause: lambda c: self._answered(self.engine.client.pause(c.mode)),
            e.Resume: lambda _: self._answered(self.engine.client.resume()),
            e.Sleep: self.sleep,
            e.Wake: self.wake,
            e.Publish: self.publish,
            e.Evaluate: self.evaluate,
        }

    def submit(self, command: e.Submit) -> None:
        """Admit this rank's share of the prompts: those that a dead engine lost first, then the next of the order."""
        self.since = time.monotonic()
        for _ in range(self._share(command)):
            attempt = self._next_attempt()
            key = attempt.key(self.task.epoch(attempt.position))
            with self.lock:
                self.in_flight[key] = attempt
            self.collector.submit(attempt.prompt, key, self.recipe.schedule.group_size, self._sampling())
        self._show_progress()

    def _share(self, command: e.Submit) -> int:
        """Groups of a Submit are dealt in turn to all ranks whose engine serves."""
        serving = [r for r in range(self.learner.ranks.world) if r not in command.without]
        first, self.dealt = self.dealt, self.dealt + command.n
        return sum(serving[i % len(serving)] == self.rank for i in range(first, self.dealt))

    def first_unfinished(self) -> int:
        """Position from which a resumed run must look for prompts: none before it is still to be generated."""
        with self.lock:
            return min([a.position for a in (*self.in_flight.values(), *self.retries)], default=self.position)

    def _next_attempt(self) -> Attempt:
        incarnation = self.engine.options.incarnation
        with self.lock:
            if self.retries:
                return replace(self.retries.pop(0), incarnation=incarnation)
        while True:
            position, self.position = self.position, self.position + 1
            if position % self.learner.ranks.world != self.rank:  # ranks take positions in turn
                continue
            attempt = Attempt(self.task.prompt(position), position, 0, incarnation)
            # A resumed run meets prompts that were generated after the checkpoint; their groups are in the log.
            if attempt.key(self.task.epoch(position)) not in self.logged:
                return attempt

    def _sampling(self) -> Sampling:
        return Sampling(**asdict(self.recipe.sampling))

    async def _verify(self, prompt: Prompt, response: NDArray[np.int32]) -> Verdict:
        text = self._text(response.tolist())
        with self.learner.stopwatch.measure("verify"):  # beside generation: its seconds overlap
            return await self.pool.verify(self.verifier, text, prompt.record, self.verifier_options)

    def _text(self, response: Sequence[int]) -> str:
        text: str = self.learner.policy.tokenizer.decode(response, skip_special_tokens=True)
        return text

    def _on_group(self, group: Group) -> None:
        """On the collector's thread: make the group durable, then tell the scheduler. Raises RunError."""
        newest, published = max((s.version for r in group.rollouts for s in r.spans), default=0), self.learner.version
        if newest > published:
            raise RunError(
                f"group {group.id} holds tokens of version {newest}, from the future: the newest that was published is "
                f"{published}; nothing else may publish to this engine"
            )
        self.learner.log.append(group)
        scored = group.scored()
        with self.lock:
            attempt = self.in_flight.pop(group.id)
            if not self.in_flight:
                self.learner.stopwatch.add("generate", time.monotonic() - self.since)
            lost = any(r.status == "lost" for r in group.rollouts)
            if lost and attempt.attempt == 0:  # once: a prompt that kills engines must not kill them all
                self.retries.append(Attempt(attempt.prompt, attempt.position, attempt.attempt + 1))
        if lost and self.said_lost < attempt.incarnation == self.engine.options.incarnation:
            self.said_lost = attempt.incarnation
            self.inbox.put(e.EngineLost(self.rank))  # before the group: nobody must submit again yet
        if lost or len(scored) < 2:
            column = "lost" if lost else "dropped:group_too_small"
            why = "its engine died" if lost else f"{len(scored)} of {len(group.rollouts)} rollouts scored"
            self.learner.journal.dispose(dict.fromkeys((r.key for r in scored), column))
            self.inbox.put(e.GroupInvalid(group.id, why))
        else:
            self.deaths = 0
            tokens = sum(r.response_tokens for r in group.rollouts)
            equal = len({r.reward for r in scored}) == 1
            now = time.time()
            seconds = max(0.0, now - max(r.finished_ns for r in group.rollouts) / 1e9)
            self.inbox.put(e.GroupDone(group.id, tokens, group.version, equal, round(seconds, 4), round(now, 4)))
        self._show_progress()

    def _show_progress(self) -> None:
        with self.lock:
            waiting = len(self.in_flight)
        self.learner.display.show_phase("generate", f"{waiting} groups to go" if waiting else "done")

    def publish(self, command: e.Publish) -> e.Published | e.PublishFailed | e.Interrupted:
        """Pack, send, check, attest."""
        learner = self.learner
        learner.display.show_phase("publish", f"version {command.version}")
        try:
            report = self.publisher.publish(command.version)
        except WeightMismatchError as error:
            learner.display.say(f"version {command.version} was refused: {error}")
            return e.PublishFailed(command.version, error.parameter)
        except EngineLost:
            return self._interrupted()
        learner.stopwatch.add("publish", report.seconds["total"] - report.seconds["attest"])
        learner.stopwatch.add("attest", report.seconds["attest"])
        learner.journal.published(command.version, learner.step, report.checksum, self.engine.options.incarnation)
        self._count_tokens()
        learner.version = command.version
        learner.published = {"weights/changed_share": report.changed_share}
        if report.gap:
            learner.published |= {f"logprob_gap_{name}": getattr(report.gap, name) for name in ("mean", "max", "k3")}
        return e.Published(command.version)

    def evaluate(self, command: e.Evaluate) -> e.EvaluationDone | e.Interrupted | None:
        """Held-out pass@k of the version that serves, by rank 0's engine; the other ranks wait."""
        learner, recipe = self.learner, self.recipe
        if self.rank:
            return None
        learner.display.show_phase("evaluate", f"{len(self.held_out)} problems x {recipe.evaluation.n}")
        try:
            with learner.stopwatch.measure("evaluate"):
                about = {"step": command.step, "version": learner.version, "seed": recipe.run.seed}
                result = evaluate(self.held_out, self._responses, self._verdicts, recipe.evaluation, **about)
        except EngineLost:
            return self._interrupted()
        append_evaluation(result, sorted({1, *recipe.evaluation.k}), learner.run_dir)
        mean, error = result.pass_at_k(1)
        learner.display.say(
            f"pass@1 at step {command.step}: {mean:.4f} ± {error:.4f} on {len(result.problems)} problems"
        )
        return e.EvaluationDone(command.step)

    def _responses(self, prompts: Sequence[Prompt], n: int, temperature: float) -> list[list[list[int]]]:
        sampling = msgspec.structs.replace(self._sampling(), temperature=temperature)
        samples = self.collector.generate_many(prompts, n, sampling)
        responses = [[s.ids().tolist() for s in group] for group in samples]
        self._count_evaluation(s for group in samples for s in group)
        return responses

    def _count_evaluation(self, samples: Iterable[Sample]) -> None:
        tokens = sum(len(s.token_ids) // 4 for s in samples)
        self.learner.journal.count_tokens(self.engine.options.incarnation, "evaluation", tokens)

    def _verdicts(self, pairs: Sequence[tuple[Prompt, Sequence[int]]]) -> list[Verdict]:
        items = [(self._text(response), prompt.record) for prompt, response in pairs]
        return self.pool.verify_many(self.verifier, items, self.verifier_options)

    def _on_failure(self, error: BaseException) -> None:
        self.failure = error
        self.inbox.put(e.Stop(now=True))

    def _on_lost(self, engine: Engine) -> None:
        self.inbox.put(e.EngineLost(self.rank))
        self.deaths_seen.put(engine)

    def _keep_engine(self) -> None:
        """Replace an engine that died. A thread for the life of the run: an engine dies with the thread that started it
        (PR_SET_PDEATHSIG)."""
        while (engine := self.deaths_seen.get()) is not None:
            try:
                self._replace(engine)
            except EngineStartError as error:
                self._on_failure(error)

    def _replace(self, engine: Engine) -> None:
        """Account for what was in flight, start a fresh process, tell the scheduler."""
        self.deaths += 1
        self.learner.display.say(f"engine incarnation {engine.options.incarnation} died; see {engine.log_path}")
        until = time.monotonic() + DRAIN_SECONDS
        while self.in_flight and time.monotonic() < until:
            time.sleep(0.05)
        if self.deaths > RESTARTS:
            raise EngineStartError(f"the engine died {self.deaths} times in a row; see {engine.log_path}")
        engine.restart()
        self.collector.attach(engine.client)
        self.publisher.engine_restarted()
        self.inbox.put(e.EngineReady(self.rank))

    def sleep(self, command: e.Sleep) -> e.Event | None:
        self._count_tokens()
        return self._answered(self.engine.client.sleep(command.tags), e.Slept())

    def _count_tokens(self) -> None:
        """Keep what this engine has generated so far; after its death nobody could tell."""
        with contextlib.suppress(EngineLost):
            counters = self.collector.call(self.engine.client.counters())
            self.learner.journal.count_tokens(counters["incarnation"], "engine", counters["tokens/generated"])

    def wake(self, command: e.Wake) -> e.Event | None:
        """The scheduler waits for the weights; the KV cache, after a publish, has no answer."""
        return self._answered(self.engine.client.wake(command.tags), e.Awake() if "weights" in command.tags else None)

    def _answered(self, coroutine: Any, event: e.Event | None = None) -> e.Event | None:
        """The event, or Interrupted where the engine died; None where no answer is waited for."""
        try:
            self.collector.call(coroutine)
        except EngineLost:
            interrupted = self._interrupted()
            return interrupted if event else None
        return event

    def _interrupted(self) -> e.Interrupted:
        self.inbox.put(e.EngineLost(self.rank))  # heard before the answer, whoever notices first
        return e.Interrupted()


def _as_group(number: int, token_ids: NDArray[np.int32]) -> Group:
    """A sequence as a group of one rollout whose every token but the first is scored."""
    prompt, name = Prompt(f"probe{number}", token_ids[:1], "probe"), f"probe.{number}"
    rollout = make_rollout(prompt, name, 0, token_ids[1:], spans=(), finish="stop", status="scored", reward=0.0)
    return Group(name, prompt, (rollout,), 0)
