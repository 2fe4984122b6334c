"""A machine that carries out the scheduler's commands, refuses a wrong order, and remembers where every group ended."""

from oapl_engine.schedule_config import MODES
from oapl_engine.scheduler import core, driver
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.state import Settings

ENGINE_ANSWERS = (e.Published, e.EvaluationDone, e.EngineSlept, e.EngineWoke)


class FakeMachine:
    """Answers every command, in an order drawn from `rng`. lose, invalid, equal: probabilities.

    One device: trainer state and the engines' memory are never on it at the same time, unless the mode overlaps them.
    An engine that died takes its memory again when it starts: immediately, or in the trainer's turn after it.
    """

    def __init__(self, state, rng, lose=0.0, invalid=0.0, equal=0.0, stop=0.0):
        self.state, self.rng = state, rng
        self.lose, self.invalid, self.equal, self.stop = lose, invalid, equal, stop
        c = state.settings
        self.code, self.log, self.pending = None, [], []
        self.running, self.doomed = {}, {}  # key -> engine, key -> how it will end
        self.version_of, self.uses, self.ended, self.step_of_version = {}, {}, {}, {}
        self.up = set(range(c.engines)) if c.generates else set()
        self.awake, self.weights, self.serving = set(self.up), {}, set()
        self.trainers_turn, self.starting, self.waiting, self.first = False, set(), set(), []
        self.loaded, self.paused, self.version, self.asked = False, "", -1, set()

    def run(self, limit=20_000):
        self.pending = [e.EngineReady(i) for i in self.up] or [e.Start()]
        for _ in range(limit):
            if self.code is not None:
                return self.code
            if self.first:
                self.come_up(self.first.pop(0), awake=False)
                continue
            if self.lose and self.up and self.rng.random() < self.lose:
                self.lose_engine(self.rng.choice(sorted(self.up)))
                continue
            if self.stop and self.rng.random() < self.stop:
                self.hear(e.Stop())
                self.stop = 0.0
                continue
            choices = [*self.pending, *(k for k in self.running if self.paused != "keep" or k in self.doomed)]
            assert choices, f"nothing in flight and no command due: {self.state}"
            choice = self.rng.choice(choices)
            if isinstance(choice, str):
                self.end_group(choice)
            else:
                self.pending.remove(choice)
                if isinstance(choice, e.EngineReady):
                    self.come_up(choice, awake=True)
                else:
                    self.hear(choice)
        raise AssertionError("the run does not end")

    def end_group(self, key):
        fate = self.doomed.get(key)
        del self.running[key]
        if fate or self.rng.random() < self.invalid:
            self.end(key, fate or "invalid")
            self.hear(e.GroupInvalid(key, fate or "invalid"))
        else:
            self.hear(e.GroupDone(key, 10, self.version_of[key], self.rng.random() < self.equal))

    def come_up(self, ready, awake):
        self.starting.discard(ready.id)
        self.up.add(ready.id)
        self.awake |= {ready.id} if awake else set()
        self.hear(ready)

    def start(self, i):
        self.starting.add(i)
        self.pending.append(e.EngineReady(i))

    def end(self, key, column):
        assert key not in self.ended, f"{key} ended as {self.ended[key]} and as {column}"
        self.ended[key] = column

    def hear(self, event):
        self.log.append(event)
        self.state, commands = core.step(self.state, event)
        for command in commands:
            self.log.append(command)
            self.execute(command)
        s = self.state
        assert s.in_flight == len(self.running), "groups in flight are miscounted"
        assert len(self.running) + len(s.buffer) <= s.settings.max_groups_ahead or not any(
            isinstance(c, e.Submit) for c in commands
        ), "generation is further ahead than max_groups_ahead"

    def execute(self, command):
        c = self.state.settings
        match command:
            case e.Submit(n, without):
                assigned = sorted(self.up - set(without))
                assert assigned, "submitted to no engine"
                assert set(assigned) <= self.serving & self.awake, "submitted to an engine that serves nothing"
                assert not self.paused, "submitted to a paused engine"
                for i in range(n):
                    key = f"g{len(self.version_of)}"
                    self.version_of[key], self.running[key] = self.version, assigned[i % len(assigned)]
            case e.Train(step, keys):
                self.train(step, keys)
            case e.Pause(mode):
                assert mode != "drain" or not self.running, "a drain that did not wait"
                self.paused = mode
                if mode == "abort":
                    self.doomed |= dict.fromkeys(set(self.running) - set(self.doomed), "aborted")
            case e.Publish(version):
                assert self.paused, "weights changed under a running engine"
                assert self.awake == self.up, "published into an engine that sleeps"
                assert c.overlaps or not self.loaded, "trainer and engine on the device at the same time"
                assert version not in self.step_of_version, "a version was reused"
                assert version > self.version, "versions only grow"
                self.step_of_version[version] = self.state.step
                self.version, self.serving = version, set()
                self.weights = dict.fromkeys(self.up, version)
                self.answer(e.Published(version))
            case e.Resume():
                self.serving = {i for i in self.up if self.weights.get(i) == self.version}
                assert not self.up or self.serving, "resumed without attested weights"
                self.paused = ""
            case e.Sleep(tags):
                assert self.paused or not self.running, "slept with groups running"
                self.awake, self.serving = set(), set()
                if "weights" in tags:
                    self.weights = {}
                self.trainers_turn = True
                self.first += [e.EngineReady(i) for i in sorted(self.starting)]  # waited for, then asleep too
                self.pending = [p for p in self.pending if p not in self.first]
                self.starting = set()
                self.answer(e.EngineSlept())
            case e.Wake(tags):
                assert c.overlaps or not self.loaded, "trainer and engine on the device at the same time"
                if "weights" in tags:
                    self.awake = set(self.up)
                    self.answer(e.EngineWoke())
            case e.LoadTrainer():
                assert c.overlaps or not (self.awake | self.starting), (
                    "trainer and engine on the device at the same time"
                )
                self.loaded = True
            case e.OffloadTrainer():
                self.loaded = self.trainers_turn = False
                for i in sorted(self.waiting):
                    self.start(i)
                self.waiting = set()
            case e.Clear(keys):
                for key in keys:
                    if key not in self.uses:
                        self.end(key, "cleared")
            case e.Resample(keys):
                for key in keys:
                    self.end(key, "resampled")
            case e.Checkpoint(step):
                self.pending.append(e.CheckpointDone(step))
            case e.Evaluate(step):
                assert self.serving, "evaluated an engine that serves nothing"
                assert not self.running, "evaluated next to generation"
                self.answer(e.EvaluationDone(step))
            case e.Exit(code):
                self.code = code

    def answer(self, event):
        self.asked = set(self.up)
        self.pending.append(event if self.up else e.Interrupted())

    def train(self, step, keys):
        c = self.state.settings
        assert self.loaded, "trained without the trainer's state"
        assert c.overlaps or not self.awake, "trainer and engine on the device at the same time"
        assert step == self.state.step + 1
        for key in keys:
            self.uses[key] = self.uses.get(key, 0) + 1
            assert self.uses[key] <= c.max_uses, "a rollout was used beyond max_uses"
            lag = step - 1 - self.step_of_version.get(self.version_of.get(key), 0)
            assert lag < c.lag * c.window, "lag beyond its bound"
            if self.uses[key] == 1:
                self.end(key, "trained")
        self.pending.append(e.StepDone(step))

    def lose_engine(self, i):
        """It is reported, and its groups later, some of which are only being verified; what it was asked is interrupted
        if no other engine answers."""
        self.up.discard(i)
        self.awake.discard(i)
        self.serving.discard(i)
        self.weights.pop(i, None)
        ungenerated = [key for key, engine in self.running.items() if engine == i and self.rng.random() < 0.7]
        self.doomed |= dict.fromkeys(ungenerated, "lost")
        self.hear(e.EngineLost(i))
        self.asked.discard(i)
        self.paused = self.paused if self.up else ""
        if not self.asked:
            self.pending = [e.Interrupted() if isinstance(p, ENGINE_ANSWERS) else p for p in self.pending]
        if self.trainers_turn:
            self.waiting.add(i)
        else:
            self.start(i)

    def unended(self):
        """Groups that ended nowhere: they must be waiting in the buffer or in flight."""
        return set(self.version_of) - set(self.ended)


def names(log):
    return [type(x).__name__ for x in log]


def make_settings(mode="phased", **fields):
    """Settings of a small run in a mode; fields override."""
    traits = MODES[mode]
    small = {"steps": 8, "groups_per_step": 2, "lag": 4, "window": 1, "max_groups_ahead": 8}
    return Settings(generates=traits.generates, overlaps=traits.overlaps, **(small | fields))


def break_rule(monkeypatch, rule, wrong):
    """Run on a core in which `wrong` stands for `rule`, one of its functions."""
    assert getattr(core, rule.__name__) is rule, f"{rule.__name__} is not a function of core"
    monkeypatch.setattr(core, rule.__name__, wrong)


def check_run(machine):
    """A complete run under the machine's eyes, what it left, and the same events once more."""
    first = machine.state
    code = machine.run()
    steps = [c.step for c in machine.log if isinstance(c, e.Train)]
    assert steps == list(range(1, len(steps) + 1)), "a step was left out, or done twice"
    assert code in (0, 130)
    assert machine.state.checkpointed == len(steps), "ended without a checkpoint"
    assert code == 130 or len(steps) == first.settings.steps
    waiting = {group.key for group in machine.state.buffer} - set(machine.uses)
    assert machine.unended() == waiting | set(machine.running), "a group is in no column of the ledger"
    commands = [x for x in machine.log if isinstance(x, e.Command)]
    assert driver.replay(first, machine.log) == commands, "it does not replay"
