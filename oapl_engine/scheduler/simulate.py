"""A run in virtual time: the same driver and the same core, on a machine of given costs, from one device to thousands.

Nothing here contains mode-specific code: it carries out commands as the real handlers do. The driver's thread is busy
while a command is carried out; engines continue next to it unless they are paused or asleep, each sequence in a slot of
its own.
"""

import bisect
import heapq
import queue
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oapl_engine.scheduler import driver
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.machine import Machine, Outcome
from oapl_engine.scheduler.state import Settings, State

GROUPS_SAMPLED = 4096  # whose lengths are drawn in one call
ROUNDING = 1e-6  # seconds: what starts with a version must not seem to have started before it


def simulate(machine: Machine, settings: Settings, seed: int = 0) -> Outcome:
    """Run `settings` on `machine`. The same arguments give the same outcome."""
    run = _SimulatedRun(machine, seed)
    driver.drive(State(settings), run, {command: [handler] for command, handler in run.handlers().items()})
    return run.history.outcome(run.fleet)


@dataclass
class _Clock:
    """Wall time of the driver, and work time, which stands still while the engines do."""

    now: float = 0.0
    paused_seconds: float = 0.0
    paused_at: float = 0.0
    running: bool = False

    def work_time(self) -> float:
        """Work time now, for an engine that starts something."""
        return self.now - self.paused_seconds

    def elapsed_work(self) -> float:
        """Work time up to now, or up to where the engines were paused."""
        return (self.now if self.running else self.paused_at) - self.paused_seconds

    def pause(self) -> None:
        if self.running:
            self.running, self.paused_at = False, self.now

    def resume(self) -> None:
        if not self.running:
            self.running, self.paused_seconds = True, self.paused_seconds + self.now - self.paused_at


@dataclass
class _Group:
    """tokens: of all its samples; started: work time; version: that sampled its first token, once it is finished."""

    tokens: int
    started: float
    version: int = -1


@dataclass
class _Engine:
    """slot_free_at: work time at which each slot is free, a heap; groups: those in flight here, to their end."""

    slot_free_at: list[float]
    groups: dict[str, float] = field(default_factory=dict)


class _Fleet:
    """The engines: sequences in slots, groups that finish in work time."""

    def __init__(self, machine: Machine, random: np.random.Generator) -> None:
        self.machine, self.random = machine, random
        self.engines = [_Engine([0.0] * machine.slots) for _ in range(machine.engines)]
        self.groups: dict[str, _Group] = {}
        self.finishing: list[tuple[float, str, int]] = []  # (work time, group, engine)
        self.idle = 0.0  # slot-seconds of work time
        self._sampled_lengths: list[list[float]] = []

    @property
    def slots(self) -> int:
        return self.machine.engines * self.machine.slots

    def start(self, key: str, number: int, now: float) -> None:
        """Put a new group's sequences into the slots of engine `number` that are free first. now: work time."""
        engine, m = self.engines[number], self.machine
        lengths = self._lengths()
        running = min(m.slots, (len(engine.groups) + 1) * m.group_size)
        seconds = m.token_seconds + m.crowding * running
        started, end = float("inf"), now
        for tokens in lengths:
            start = max(engine.slot_free_at[0], now)
            self.idle += start - engine.slot_free_at[0]
            heapq.heapreplace(engine.slot_free_at, start + tokens * seconds)
            started, end = min(started, start), max(end, start + tokens * seconds)
        end += float(self.random.exponential(m.verify_seconds)) if m.verify_seconds else 0.0
        self.groups[key] = _Group(int(sum(lengths)), started)
        engine.groups[key] = end
        heapq.heappush(self.finishing, (end, key, number))

    def pop_finished(self, work_time: float) -> str | None:
        """The group that finished first, if one has by then; groups that died with their engine are passed over."""
        while self.finishing and self.finishing[0][0] <= work_time:
            end, key, number = heapq.heappop(self.finishing)
            if self.engines[number].groups.get(key) == end:
                del self.engines[number].groups[key]
                return key
        return None

    def drop(self, number: int, now: float) -> list[str]:
        """Keys of the groups that an engine was generating; it starts empty. now: work time."""
        gone = list(self.engines[number].groups)
        self.engines[number] = _Engine([now] * self.machine.slots)
        return gone

    def _lengths(self) -> list[float]:
        """Tokens of one group's samples."""
        if not self._sampled_lengths:
            m = self.machine
            common = self.random.standard_normal((GROUPS_SAMPLED, 1)) * np.sqrt(m.prompt_share)
            own = self.random.standard_normal((GROUPS_SAMPLED, m.group_size)) * np.sqrt(1 - m.prompt_share)
            lengths = np.exp(m.tokens_sigma * (common + own) - m.tokens_sigma**2 / 2) * m.tokens_mean
            self._sampled_lengths = np.clip(np.rint(lengths), 1, m.tokens_most).tolist()
        return self._sampled_lengths.pop()


class _History:
    """What happened: one point per optimizer step, the versions, the lags."""

    def __init__(self) -> None:
        # (wall seconds, seconds in optimizer steps, slot-seconds in use, tokens trained) after each step
        self.points: list[tuple[float, float, float, float]] = [(0.0, 0.0, 0.0, 0.0)]
        self.published: list[tuple[float, int]] = []  # (work time, version)
        self.step_of_version = {-1: 0}
        self.lags: dict[int, int] = {}
        self.finished = self.cleared = self.failures = 0

    def publish(self, work_time: float, version: int) -> None:
        self.published.append((work_time - ROUNDING, version))
        self.step_of_version[version] = len(self.points) - 1

    def version_at(self, work_time: float) -> int:
        index = bisect.bisect_right(self.published, (work_time, len(self.published))) - 1
        return self.published[max(0, index)][1]

    def count_lag(self, step: int, version: int) -> None:
        lag = step - 1 - self.step_of_version[version]
        self.lags[lag] = self.lags.get(lag, 0) + 1

    def outcome(self, fleet: _Fleet) -> Outcome:
        steps = len(self.points) - 1
        first, last = self.points[steps // 4], self.points[steps - steps // 4]
        seconds, training, used, tokens = (after - before for before, after in zip(first, last, strict=True))
        return Outcome(
            seconds=self.points[-1][0],
            training=training / seconds,
            generation=used / seconds / fleet.slots,
            tokens_per_second=tokens / seconds,
            cleared=self.cleared / max(1, self.finished),
            failures=self.failures,
            lags=self.lags,
        )


class _SimulatedRun:
    """The inbox and the handlers of a simulated run."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.machine = machine
        self.random = np.random.default_rng(seed)
        self.clock = _Clock()
        self.fleet = _Fleet(machine, self.random)
        self.history = _History()
        self.arriving: list[tuple[float, int, e.Event | None]] = []  # (time, order, event); None: an engine fails
        self.count = self.groups_assigned = 0
        for number in range(machine.engines):
            self._arrive(0.0, e.EngineReady(number))
        self._schedule_failure()

    def handlers(self) -> dict[type, Any]:
        plain = (e.LoadTrainer, e.OffloadTrainer, e.Resample)
        return {
            **dict.fromkeys(plain, self._spend),
            e.Submit: self.submit,
            e.Pause: self.pause,
            e.Resume: self.resume,
            e.Sleep: self.sleep,
            e.Wake: self.wake,
            e.Publish: self.publish,
            e.Train: self.train,
            e.Clear: self.clear,
            e.Checkpoint: lambda command: self._spend(command, e.CheckpointDone(command.step)),
            e.Evaluate: lambda command: self._spend(command, e.EvaluationDone(command.step)),
        }

    def get(self, block: bool = True, timeout: float | None = None) -> e.Event:
        """The next event, whenever it comes."""
        next_times = [self.arriving[0][0]] if self.arriving else []
        if self.clock.running and self.fleet.finishing:
            next_times.append(self.fleet.finishing[0][0] + self.clock.paused_seconds)
        self.clock.now = max(self.clock.now, min(next_times))
        try:
            return self.get_nowait()
        except queue.Empty:  # the group that was to finish died with its engine
            return self.get()

    def get_nowait(self) -> e.Event:
        if self.clock.running:
            # Compared as wall time: a difference would round the other way.
            while self.fleet.finishing and self.fleet.finishing[0][0] + self.clock.paused_seconds <= self.clock.now:
                key = self.fleet.pop_finished(self.fleet.finishing[0][0])
                if key is not None:
                    return self._finish(key)
        while self.arriving and self.arriving[0][0] <= self.clock.now:
            time, _, event = heapq.heappop(self.arriving)
            if event is not None:
                return event
            self._fail(time)
        raise queue.Empty

    def submit(self, command: e.Submit) -> None:
        serving = sorted(set(range(self.machine.engines)) - set(command.without))
        for _ in range(command.n):
            self.count += 1
            number = serving[self.groups_assigned % len(serving)]
            self.fleet.start(f"g{self.count}", number, self.clock.work_time())
            self.groups_assigned += 1

    def pause(self, command: e.Pause) -> None:
        self._spend(command)
        self.clock.pause()
        if command.mode == "abort":
            for number in range(self.machine.engines):
                self._drop(number, "aborted")

    def resume(self, command: e.Resume) -> None:
        self._spend(command)
        self.clock.resume()

    def sleep(self, command: e.Sleep) -> e.Event:
        self.clock.pause()
        self._spend(command)
        return e.EngineSlept()

    def wake(self, command: e.Wake) -> e.Event | None:
        return self._spend(command, e.EngineWoke() if "weights" in command.tags else None)

    def publish(self, command: e.Publish) -> e.Event:
        self._spend(command)
        self.history.publish(self.clock.paused_at - self.clock.paused_seconds, command.version)
        return e.Published(command.version)

    def train(self, command: e.Train) -> e.Event:
        groups = [self.fleet.groups[key] for key in command.keys]
        tokens = sum(group.tokens for group in groups)
        seconds = self.machine.costs.get("Train", 0.0) + tokens * self.machine.train_token_seconds
        self.clock.now += seconds
        for group in groups:
            self.history.count_lag(command.step, group.version)
        _, training, _, trained = self.history.points[-1]
        used = self.clock.elapsed_work() * self.fleet.slots - self.fleet.idle
        self.history.points.append((self.clock.now, training + seconds, used, trained + tokens))
        return e.StepDone(command.step)

    def clear(self, command: e.Clear) -> None:
        self.history.cleared += len(command.keys)

    def _finish(self, key: str) -> e.Event:
        group = self.fleet.groups[key]
        self.history.finished += 1
        group.version = self.history.version_at(group.started)
        return e.GroupDone(key, group.tokens, group.version)

    def _spend(self, command: e.Command, answer: e.Event | None = None) -> e.Event | None:
        self.clock.now += self.machine.costs.get(type(command).__name__, 0.0)
        return answer

    def _arrive(self, time: float, event: e.Event | None) -> None:
        self.count += 1
        heapq.heappush(self.arriving, (time, self.count, event))

    def _schedule_failure(self) -> None:
        if self.machine.failure_seconds < float("inf"):
            wait = self.random.exponential(self.machine.failure_seconds / self.machine.engines)
            self._arrive(self.clock.now + wait, None)

    def _fail(self, time: float) -> None:
        """An engine dies, with what it was generating, and comes back later."""
        self.history.failures += 1
        number = int(self.random.integers(self.machine.engines))
        self._arrive(time, e.EngineLost(number))
        self._drop(number, "lost")
        self._arrive(time + self.machine.restart_seconds, e.EngineReady(number))
        self._schedule_failure()

    def _drop(self, number: int, reason: str) -> None:
        for key in self.fleet.drop(number, self.clock.work_time()):
            self._arrive(self.clock.now, e.GroupInvalid(key, reason))
