"""Algorithm 1 (arXiv 2602.19362) as a pure state machine: `step(state, event) -> (state, commands)`.

    copy π to π_vllm; engines generate into the buffer D; the trainer takes optimizer steps on D;
    every L steps copy π to π_vllm and clear D.

Modes are settings of one machine. `phased` and `sync` (L = 1) alternate generation and training on one device: the
window's groups are generated, the engine sleeps, L steps are trained, the new version is published. `async` overlaps
them. `offline` has no engine and never publishes. Time enters only as events; nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from oapl_engine.config import Recipe
from oapl_engine.scheduler import events as e


@dataclass(frozen=True)
class Settings:
    """What the recipe says about time. Counts: steps are optimizer steps, credit and groups_per_step are groups."""

    mode: str
    steps: int
    groups_per_step: int
    lag: int
    window: int
    credit: int
    allowance: int = 1
    on_publish: str = "drain"
    max_kl: float | None = None
    checkpoint_every: int = 0
    evaluate: bool = True
    evaluate_every: int = 0

    @property
    def engine(self) -> bool:
        return self.mode != "offline"

    @property
    def overlap(self) -> bool:
        return self.mode == "async"


@dataclass(frozen=True)
class Waiting:
    """A durable group that may be trained."""

    key: str
    version: int
    uses: int = 0


@dataclass(frozen=True)
class State:
    """Everything a decision rests on. version -1: no engine serves attested weights."""

    settings: Settings
    step: int = 0
    version: int = -1
    next_version: int = 0
    published_step: int = 0
    version_steps: tuple[tuple[int, int], ...] = ()
    buffer: tuple[Waiting, ...] = ()
    in_flight: int = 0
    replay: tuple[tuple[str, ...], ...] = ()
    doing: str = ""
    engine: str = "none"
    loaded: bool = False
    evaluated: int = -1
    checkpointed: int = 0
    drifted: bool = False
    stopping: bool = False
    exited: bool = False


def settings_of(recipe: Recipe) -> Settings:
    """Settings of a recipe with the automatic values filled in."""
    s = recipe.schedule
    lag = s.steps if s.mode == "offline" else s.lag
    return Settings(
        mode=s.mode,
        steps=s.steps,
        groups_per_step=s.groups_per_step,
        lag=lag,
        window=s.window or (2 if s.mode == "async" else 1),
        credit=s.credit or lag * s.groups_per_step,
        allowance=s.allowance,
        on_publish=s.on_publish,
        max_kl=s.max_kl,
        checkpoint_every=recipe.checkpoint.every,
        evaluate=recipe.evaluation.n > 0 and s.mode != "offline",
        evaluate_every=recipe.evaluation.every,
    )


def step(state: State, event: e.Event) -> tuple[State, tuple[e.Command, ...]]:
    """The next state and what to do now. The same events give the same commands."""
    if state.exited:
        return state, ()
    state, commands = _hear(state, event)
    while True:
        state, more = _decide(state)
        commands += more
        if not more or state.doing or state.exited:
            return state, commands


def _hear(s: State, event: e.Event) -> tuple[State, tuple[e.Command, ...]]:
    match event:
        case e.GroupDone(key, _, version):
            s = replace(s, in_flight=max(0, s.in_flight - 1))
            if _outside_window(s, version):  # it was in flight across a publish
                return s, (e.Clear((key,)),)
            return replace(s, buffer=(*s.buffer, Waiting(key, version))), ()
        case e.GroupInvalid():
            return replace(s, in_flight=max(0, s.in_flight - 1)), ()
        case e.StepDone(step=done, kl=kl):
            drifted = s.settings.max_kl is not None and kl is not None and kl > s.settings.max_kl
            return replace(s, doing="", step=done, drifted=drifted), ()
        case e.Published(version):
            return _published(s, version)
        case e.PublishFailed():
            return replace(s, exited=True), (e.Exit(3),)
        case e.Slept():
            return replace(s, doing="", engine="asleep"), ()
        case e.Awake():
            return replace(s, doing="", engine="ready"), ()
        case e.CheckpointDone(step=done):
            return replace(s, doing="", checkpointed=done), ()
        case e.EvaluationDone(step=done):
            return replace(s, doing="", evaluated=done), ()
        case e.EngineLost():
            doing = s.doing if s.doing in ("train", "checkpoint") else ""
            return replace(s, engine="none", version=-1, in_flight=0, doing=doing), ()
        case e.EngineReady(version=version):
            return replace(s, engine="ready", version=version), ()
        case e.Stop(now=True):
            return replace(s, exited=True), (e.Exit(130),)
        case e.Stop():
            return replace(s, stopping=True), ()
        case _:
            return s, ()


def _published(s: State, version: int) -> tuple[State, tuple[e.Command, ...]]:
    """Serve the version; groups whose version fell out of the window leave D (Algorithm 1: clear)."""
    s = replace(
        s,
        doing="",
        version=version,
        published_step=s.step,
        version_steps=(*s.version_steps, (version, s.step)),
        drifted=False,
    )
    gone = tuple(w.key for w in s.buffer if _outside_window(s, w.version))
    s = replace(s, buffer=tuple(w for w in s.buffer if w.key not in set(gone)))
    clear = (e.Clear(gone),) if gone else ()
    wake = () if s.settings.overlap else (e.Wake(("kv_cache",)),)
    return s, (*clear, *wake, e.Resume())


def _outside_window(s: State, version: int) -> bool:
    """Whether `version` is older than the last `window` steps that were published."""
    step_of = dict(s.version_steps)
    newest = sorted(set(step_of.values()))[-s.settings.window :]
    return bool(newest) and step_of.get(version, -1) < newest[0]


def _decide(s: State) -> tuple[State, tuple[e.Command, ...]]:
    """The first rule that applies. At most one long command is under way beside generation."""
    if s.doing:
        return _generate(s) if s.settings.overlap else (s, ())
    for rule in (_stop, _checkpoint, _publish, _evaluate, _finish, _train, _generate):
        after, commands = rule(s)
        if commands or after is not s:
            return after, commands
    return s, ()


def _stop(s: State) -> tuple[State, tuple[e.Command, ...]]:
    if not s.stopping:
        return s, ()
    if s.checkpointed < s.step:
        return replace(s, doing="checkpoint"), (e.Checkpoint(s.step),)
    return replace(s, exited=True), (e.Exit(130),)


def _checkpoint(s: State) -> tuple[State, tuple[e.Command, ...]]:
    every = s.settings.checkpoint_every
    due = s.step >= s.settings.steps or (s.step % every == 0 if every else _window_over(s))
    if s.step <= s.checkpointed or not due or s.replay:
        return s, ()
    return replace(s, doing="checkpoint"), (e.Checkpoint(s.step),)


def _window_over(s: State) -> bool:
    return s.settings.engine and (s.drifted or s.step - s.published_step >= s.settings.lag)


def _publish(s: State) -> tuple[State, tuple[e.Command, ...]]:
    """Due after L steps, past the drift bound, for the last evaluation, or when an engine is needed and none serves."""
    c = s.settings
    last = s.step >= c.steps
    fresh = s.version >= 0 and s.published_step == s.step
    needed = s.version < 0 and (_wants_groups(s) or _evaluation_due(s))
    over = _window_over(s) and not (last and not c.evaluate)
    if not c.engine or s.replay or fresh or not (over or needed or (last and c.evaluate)):
        return s, ()
    if s.engine == "none" or (s.in_flight and c.on_publish == "drain"):
        return s, ()
    if s.loaded and not c.overlap:
        return replace(s, loaded=False), (e.OffloadTrainer(),)
    if s.engine == "asleep":
        return replace(s, doing="wake"), (e.Wake(("weights",)),)
    after = replace(s, doing="publish", next_version=s.next_version + 1)  # a number is spent even if the publish fails
    return after, (e.Pause(c.on_publish), e.Publish(s.next_version))


def _evaluation_due(s: State) -> bool:
    c = s.settings
    if not c.evaluate or s.evaluated >= s.step:
        return False
    between = c.evaluate_every and s.published_step == s.step and s.step - s.evaluated >= c.evaluate_every
    return s.step == 0 or s.step >= c.steps or bool(between)


def _evaluate(s: State) -> tuple[State, tuple[e.Command, ...]]:
    if not _evaluation_due(s) or s.version < 0 or s.published_step != s.step or s.engine != "ready" or s.in_flight:
        return s, ()
    return replace(s, doing="evaluate"), (e.Evaluate(s.step),)


def _finish(s: State) -> tuple[State, tuple[e.Command, ...]]:
    exhausted = not s.settings.engine and not s.buffer and not s.replay
    if (s.step < s.settings.steps and not exhausted) or (s.settings.evaluate and s.evaluated < s.step):
        return s, ()
    if s.checkpointed < s.step:
        return replace(s, doing="checkpoint"), (e.Checkpoint(s.step),)
    return replace(s, exited=True), (e.Exit(0),)


def _groups_needed(s: State) -> int:
    """Groups that the rest of this window will train and that are not in the buffer yet."""
    c = s.settings
    horizon = c.steps if c.overlap else min(s.published_step + c.lag, c.steps)
    steps = max(0, horizon - s.step - len(s.replay))
    uses = sum(c.allowance - w.uses for w in s.buffer)
    distinct = c.groups_per_step - len(s.buffer) if steps else 0
    return max(0, distinct, -(-(steps * c.groups_per_step - uses) // c.allowance))


def _wants_groups(s: State) -> bool:
    return s.settings.engine and s.step < s.settings.steps and _groups_needed(s) > s.in_flight


def _train(s: State) -> tuple[State, tuple[e.Command, ...]]:
    """One optimizer step on the oldest groups; steps that a killed run had done come first, with the same groups."""
    c = s.settings
    if s.step >= c.steps:
        return s, ()
    if not s.replay:
        enough = c.groups_per_step if c.engine else 1  # a file's last step may be a smaller one
        if len(s.buffer) < enough or _window_over(s):
            return s, ()
        if c.engine and not c.overlap and (_groups_needed(s) or s.in_flight):
            return s, ()
    if s.engine == "ready" and c.engine and not c.overlap:
        return replace(s, doing="sleep"), (e.Sleep(("weights", "kv_cache")),)
    if not s.loaded:
        return replace(s, loaded=True), (e.LoadTrainer(),)
    if s.replay:
        keys, rest = s.replay[0], s.replay[1:]
        return replace(s, doing="train", replay=rest), (e.Train(s.step + 1, keys),)
    used, rest_buffer = s.buffer[: c.groups_per_step], s.buffer[c.groups_per_step :]
    again = tuple(replace(w, uses=w.uses + 1) for w in used if w.uses + 1 < c.allowance)
    s = replace(s, doing="train", buffer=(*rest_buffer, *again))
    return s, (e.Train(s.step + 1, tuple(w.key for w in used)),)


def _generate(s: State) -> tuple[State, tuple[e.Command, ...]]:
    c = s.settings
    if not c.engine or s.engine != "ready" or s.version < 0 or s.doing in ("publish", "evaluate") or s.stopping:
        return s, ()
    if s.step >= c.steps or _evaluation_due(s) or (_window_over(s) and c.on_publish == "drain"):
        return s, ()
    n = min(_groups_needed(s) - s.in_flight, c.credit - s.in_flight - len(s.buffer))
    if n <= 0:
        return s, ()
    return replace(s, in_flight=s.in_flight + n), (e.Submit(n),)
