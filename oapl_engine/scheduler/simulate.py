"""A run in virtual time: the same driver and the same core, on a machine of given costs, from one device to thousands.

Nothing here knows the modes: it obeys commands as the rooms do. The driver's thread is busy while a command is carried
out; engines go on beside it unless they are paused or asleep, each sequence in a slot of its own.
"""

import bisect
import heapq
import queue
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oapl_engine.scheduler import core, driver
from oapl_engine.scheduler import events as e

DRAWN_AT_ONCE = 4096
ROUNDING = 1e-6  # seconds: what starts with a version must not seem to have started before it


@dataclass(frozen=True)
class Machine:
    """What a run costs, in seconds.

    engines, slots: sequences that one engine runs at once. token_seconds: of one sequence, plus crowding for every
    sequence on its engine. costs: command name to seconds in which the driver is busy with it; train_token_seconds:
    added for every token of a step. Response tokens: lognormal with this mean and sigma of ln, cut at tokens_most;
    prompt_share: of that variance, what samples of one prompt have in common. verify_seconds: mean, exponential.
    failure_seconds: mean time between failures of one engine; restart_seconds: until it is back.
    """

    engines: int
    slots: int
    token_seconds: float
    costs: Mapping[str, float]
    crowding: float = 0.0
    train_token_seconds: float = 0.0
    group_size: int = 8
    tokens_mean: float = 100.0
    tokens_sigma: float = 0.0
    tokens_most: int = 1 << 20
    prompt_share: float = 0.5
    verify_seconds: float = 0.0
    failure_seconds: float = float("inf")
    restart_seconds: float = 0.0


@dataclass
class Outcome:
    """What a run would be like. seconds: until its last step.

    Shares are of the time between the first and the last quarter of its steps. training: of it, in optimizer steps;
    generation: of the engines' slots in use; cleared: of the finished groups, those that left the window untrained;
    lags: lag in optimizer steps to the groups trained at it.
    """

    seconds: float
    training: float
    generation: float
    tokens_per_second: float
    cleared: float
    failures: int
    lags: dict[int, int]

    def lag_percentile(self, share: float) -> int:
        """The lag that `share` (0…1) of the trained groups does not exceed."""
        lags = sorted(self.lags)
        counts = np.cumsum([self.lags[lag] for lag in lags])
        return lags[int(np.searchsorted(counts, share * counts[-1]))]


def simulate(machine: Machine, settings: core.Settings, seed: int = 0) -> Outcome:
    """Run `settings` on `machine`. The same arguments give the same outcome."""
    run = _Run(machine, settings, seed)
    driver.drive(core.State(settings), run, run.handlers())
    return run.outcome()


@dataclass
class _Group:
    tokens: int
    began: float
    version: int = -1


@dataclass
class _Engine:
    """free: when each slot is free, a heap in work time; groups: those in flight here."""

    free: list[float]
    groups: dict[str, float] = field(default_factory=dict)


class _Run:
    """The inbox and the rooms of a simulated run. Work time stands still while the engines do."""

    def __init__(self, machine: Machine, settings: core.Settings, seed: int) -> None:
        self.machine, self.settings = machine, settings
        self.random = np.random.default_rng(seed)
        self.now, self.stood, self.stopped_at = 0.0, 0.0, 0.0
        self.running = False
        self.slots = machine.engines * machine.slots
        self.engines = [_Engine([0.0] * machine.slots) for _ in range(machine.engines)]
        self.groups: dict[str, _Group] = {}
        self.finishing: list[tuple[float, str, int]] = []  # (work time, group, engine)
        self.arriving: list[tuple[float, int, e.Event]] = []  # (time, order, event)
        self.count = self.dealt = self.finished = self.cleared = self.failures = 0
        self.tokens_done = self.idle = self.trained_seconds = 0.0  # idle: slot-seconds of work time
        self.published: list[tuple[float, int]] = []
        self.step_of = {-1: 0}
        self.lags: dict[int, int] = {}
        self.history: list[tuple[float, float, float, float]] = [(0.0, 0.0, 0.0, 0.0)]
        self.drawn: list[list[float]] = []
        for i in range(machine.engines):
            self._arrive(0.0, e.EngineReady(i))
        self._schedule_failure()

    def handlers(self) -> dict[type, Any]:
        plain = (e.LoadTrainer, e.OffloadTrainer, e.Resample)
        return {
            **dict.fromkeys(plain, self._spend),
            e.Submit: self.submit,
            e.Pause: self.pause,
            e.Resume: self.resume,
            e.Sleep: self.sleep,
            e.Wake: lambda c: self._spend(c, e.Awake() if "weights" in c.tags else None),
            e.Publish: self.publish,
            e.Train: self.train,
            e.Clear: self.clear,
            e.Checkpoint: lambda c: self._spend(c, e.CheckpointDone(c.step)),
            e.Evaluate: lambda c: self._spend(c, e.EvaluationDone(c.step)),
        }

    def get(self, block: bool = True, timeout: float | None = None) -> e.Event:
        """The next event, whenever it comes."""
        next_times = [self.arriving[0][0]] if self.arriving else []
        if self.running and self.finishing:
            next_times.append(self.finishing[0][0] + self.stood)
        self.now = max(self.now, min(next_times))
        try:
            return self.get_nowait()
        except queue.Empty:  # the group that was to finish died with its engine
            return self.get()

    def get_nowait(self) -> e.Event:
        while self.running and self.finishing and self.finishing[0][0] + self.stood <= self.now:
            work_time, key, engine = heapq.heappop(self.finishing)
            if self.engines[engine].groups.get(key) == work_time:
                del self.engines[engine].groups[key]
                return self._finish(key)
        while self.arriving and self.arriving[0][0] <= self.now:
            time, _, event = heapq.heappop(self.arriving)
            if isinstance(event, e.Tick):
                self._fail(time)
            else:
                return event
        raise queue.Empty

    def submit(self, command: e.Submit) -> None:
        serving = sorted(set(range(len(self.engines))) - set(command.without))
        for _ in range(command.n):
            self._start(serving[self.dealt % len(serving)])
            self.dealt += 1

    def _start(self, number: int) -> None:
        """Put a new group's sequences into the slots of an engine that are free first."""
        engine, m, now = self.engines[number], self.machine, self.now - self.stood
        lengths = self._lengths()
        running = min(m.slots, (len(engine.groups) + 1) * m.group_size)
        seconds = m.token_seconds + m.crowding * running
        began, end = float("inf"), now
        for tokens in lengths:
            start = max(engine.free[0], now)
            self.idle += start - engine.free[0]
            heapq.heapreplace(engine.free, start + tokens * seconds)
            began, end = min(began, start), max(end, start + tokens * seconds)
        end += float(self.random.exponential(m.verify_seconds)) if m.verify_seconds else 0.0
        self.count += 1
        key, tokens = f"g{self.count}", sum(lengths)
        self.groups[key] = _Group(int(tokens), began)
        engine.groups[key] = end
        heapq.heappush(self.finishing, (end, key, number))

    def _lengths(self) -> list[float]:
        """Tokens of one group's samples."""
        if not self.drawn:
            m = self.machine
            common = self.random.standard_normal((DRAWN_AT_ONCE, 1)) * np.sqrt(m.prompt_share)
            own = self.random.standard_normal((DRAWN_AT_ONCE, m.group_size)) * np.sqrt(1 - m.prompt_share)
            drawn = np.exp(m.tokens_sigma * (common + own) - m.tokens_sigma**2 / 2) * m.tokens_mean
            self.drawn = np.clip(np.rint(drawn), 1, m.tokens_most).tolist()
        return self.drawn.pop()

    def _finish(self, key: str) -> e.Event:
        group = self.groups[key]
        self.finished += 1
        at = bisect.bisect_right(self.published, (group.began, len(self.published))) - 1
        group.version = self.published[max(0, at)][1]
        return e.GroupDone(key, group.tokens, group.version)

    def pause(self, command: e.Pause) -> None:
        self._spend(command)
        if self.running:
            self.running, self.stopped_at = False, self.now
        if command.mode == "abort":
            for number in range(len(self.engines)):
                self._drop(number, "aborted")

    def resume(self, command: e.Resume) -> None:
        self._spend(command)
        if not self.running:
            self.running, self.stood = True, self.stood + self.now - self.stopped_at

    def sleep(self, command: e.Sleep) -> e.Event:
        if self.running:
            self.running, self.stopped_at = False, self.now
        self._spend(command)
        return e.Slept()

    def publish(self, command: e.Publish) -> e.Event:
        self._spend(command)
        self.published.append((self.stopped_at - self.stood - ROUNDING, command.version))
        self.step_of[command.version] = len(self.history) - 1
        return e.Published(command.version)

    def train(self, command: e.Train) -> e.Event:
        groups = [self.groups[key] for key in command.keys]
        tokens = sum(g.tokens for g in groups)
        seconds = self.machine.costs.get("Train", 0.0) + tokens * self.machine.train_token_seconds
        self.now += seconds
        self.trained_seconds += seconds
        self.tokens_done += tokens
        for group in groups:
            lag = command.step - 1 - self.step_of[group.version]
            self.lags[lag] = self.lags.get(lag, 0) + 1
        stood = self.stood if self.running else self.stood + self.now - self.stopped_at
        used = (self.now - stood) * self.slots - self.idle
        self.history.append((self.now, self.trained_seconds, used, self.tokens_done))
        return e.StepDone(command.step)

    def clear(self, command: e.Clear) -> None:
        self.cleared += len(command.keys)

    def _spend(self, command: e.Command, answer: e.Event | None = None) -> e.Event | None:
        self.now += self.machine.costs.get(type(command).__name__, 0.0)
        return answer

    def _arrive(self, time: float, event: e.Event) -> None:
        self.count += 1
        heapq.heappush(self.arriving, (time, self.count, event))

    def _schedule_failure(self) -> None:
        if self.machine.failure_seconds < float("inf"):
            wait = self.random.exponential(self.machine.failure_seconds / self.machine.engines)
            self._arrive(self.now + wait, e.Tick(0))

    def _fail(self, time: float) -> None:
        """An engine dies, with what it was generating, and comes back later."""
        self.failures += 1
        number = int(self.random.integers(len(self.engines)))
        self._arrive(time, e.EngineLost(number))
        self._drop(number, "lost")
        self._arrive(time + self.machine.restart_seconds, e.EngineReady(number))
        self._schedule_failure()

    def _drop(self, number: int, reason: str) -> None:
        for key in self.engines[number].groups:
            self._arrive(self.now, e.GroupInvalid(key, reason))
        self.engines[number] = _Engine([self.now - self.stood] * self.machine.slots)

    def outcome(self) -> Outcome:
        steps = len(self.history) - 1
        (t0, a0, b0, n0), (t1, a1, b1, n1) = (self.history[i] for i in (steps // 4, steps - steps // 4))
        return Outcome(
            seconds=self.history[-1][0],
            training=(a1 - a0) / (t1 - t0),
            generation=(b1 - b0) / (t1 - t0) / self.slots,
            tokens_per_second=(n1 - n0) / (t1 - t0),
            cleared=self.cleared / max(1, self.finished),
            failures=self.failures,
            lags=self.lags,
        )
