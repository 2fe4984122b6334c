"""Algorithm 1 (arXiv 2602.19362) as a pure state machine: `step(state, event) -> (state, commands)`.

    copy π to π_vllm; engines generate into the buffer D; the trainer takes optimizer steps on D;
    every L steps copy π to π_vllm and clear D.

Modes are settings of one machine. `phased` and `sync` (L = 1) alternate generation and training on one device: the
window's groups are generated, the engine sleeps, L steps are trained, the new version is published. `async` overlaps
them. `offline` has no engine and never publishes. Time enters only as events; nothing here does I/O.

A long tail need not be waited for: with on_publish = "keep" or "abort", an alternating mode generates up to
max_groups_ahead groups and trains as soon as the window's groups are there; the rest finishes in the next phase, or is
aborted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from oapl_engine.config import Recipe
from oapl_engine.scheduler import events as e


@dataclass(frozen=True)
class Settings:
    """What the recipe says about time. Steps and lag are in optimizer steps, max_groups_ahead in groups."""

    mode: str
    steps: int
    groups_per_step: int
    lag: int
    window: int
    max_groups_ahead: int
    max_uses: int = 1
    on_publish: str = "drain"
    max_kl: float | None = None
    checkpoint_every: int = 0
    evaluate: bool = True
    evaluate_every: int = 0
    engines: int = 1
    resample: bool = False

    @property
    def engine(self) -> bool:
        return self.mode != "offline"

    @property
    def overlap(self) -> bool:
        return self.mode == "async"

    @property
    def drain(self) -> bool:
        return self.on_publish == "drain"

    @property
    def spare(self) -> int:
        """Groups generated beyond what a phase trains, so that it need not wait for the slowest."""
        return 0 if self.drain or self.overlap else max(0, self.max_groups_ahead - self.lag * self.groups_per_step)


@dataclass(frozen=True)
class Waiting:
    """A durable group that may be trained."""

    key: str
    version: int
    uses: int = 0


class Buffer:
    """D of Algorithm 1, oldest first. Immutable; append and take cost O(1) whatever its length.

    Sequences share one list as slices of an array do: who appends writes behind its own end, where no earlier sequence
    looks, and copies if another has written there before.
    """

    __slots__ = ("_items", "_start", "_stop", "uses")

    def __init__(self, items: Iterable[Waiting] = ()):
        self._items = list(items)
        self._start, self._stop = 0, len(self._items)
        self.uses = sum(w.uses for w in self._items)

    def _slice(self, start: int, stop: int, uses: int) -> "Buffer":
        other = Buffer.__new__(Buffer)
        other._items, other._start, other._stop, other.uses = self._items, start, stop, uses
        return other

    def append(self, group: Waiting) -> "Buffer":
        own = self if self._stop == len(self._items) else Buffer(self)
        own._items.append(group)
        return own._slice(own._start, own._stop + 1, self.uses + group.uses)

    def take(self, n: int) -> tuple[tuple[Waiting, ...], "Buffer"]:
        """The n oldest (all if fewer), and the rest."""
        middle = min(self._start + n, self._stop)
        taken = tuple(self._items[self._start : middle])
        rest = self._slice(middle, self._stop, self.uses - sum(w.uses for w in taken))
        return taken, Buffer(rest) if 2 * len(rest) < middle else rest  # the consumed front must not grow for ever

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._items[self._start : self._stop])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Buffer) and list(self) == list(other)


@dataclass(frozen=True)
class State:
    """Everything a decision rests on. version -1: nothing was published yet by this process.

    engines: those that are up; awake: of these, those that hold their memory; serving: those that hold `version`. Each
    changes with the command, not with its answer: an engine that died and came back in between is told apart.
    version_steps: the step of each version in the window; equal_run: all-equal groups in a row.
    """

    settings: Settings
    step: int = 0
    version: int = -1
    next_version: int = 0
    published_step: int = 0
    version_steps: tuple[tuple[int, int], ...] = ()
    buffer: Buffer = field(default_factory=Buffer)
    in_flight: int = 0
    equal_run: int = 0
    replay: tuple[tuple[str, ...], ...] = ()
    doing: str = ""
    engines: frozenset[int] = frozenset()
    awake: frozenset[int] = frozenset()
    serving: frozenset[int] = frozenset()
    loaded: bool = False
    evaluated: int = -1
    checkpointed: int = 0
    drifted: bool = False
    stopping: bool = False
    exited: bool = False


def settings_of(recipe: Recipe, engines: int = 1) -> Settings:
    """Settings of a recipe with the automatic values filled in. engines: of all ranks together."""
    s = recipe.schedule
    lag = s.steps if s.mode == "offline" else s.lag
    carries = s.mode == "async" or (s.mode == "phased" and s.on_publish == "keep")
    same = ("mode", "steps", "groups_per_step", "max_uses", "on_publish", "max_kl")
    return Settings(
        **{name: getattr(s, name) for name in same},
        lag=lag,
        window=s.window or (2 if carries else 1),
        max_groups_ahead=s.max_groups_ahead or lag * s.groups_per_step,
        checkpoint_every=recipe.checkpoint.every,
        evaluate=recipe.evaluation.n > 0 and s.mode != "offline",
        evaluate_every=recipe.evaluation.every,
        engines=engines,
        resample=recipe.objective.equal_groups == "resample",
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
        case e.GroupDone():
            return _group_done(replace(s, in_flight=max(0, s.in_flight - 1)), event)
        case e.GroupInvalid():
            return replace(s, in_flight=max(0, s.in_flight - 1)), ()
        case e.StepDone(step=done, kl=kl):
            drifted = s.settings.max_kl is not None and kl is not None and kl > s.settings.max_kl
            return replace(s, doing="", step=done, drifted=drifted), ()
        case e.Published(version):
            return _published(s, version)
        case e.PublishFailed():
            return replace(s, exited=True), (e.Exit(3),)
        case e.Slept() | e.Awake() | e.Interrupted():
            return replace(s, doing=""), ()
        case e.CheckpointDone(step=done):
            return replace(s, doing="", checkpointed=done), ()
        case e.EvaluationDone(step=done):
            return replace(s, doing="", evaluated=done), ()
        case e.EngineLost(id=i):
            return replace(s, engines=s.engines - {i}, awake=s.awake - {i}, serving=s.serving - {i}), ()
        case e.EngineReady(id=i):
            return replace(s, engines=s.engines | {i}, awake=s.awake | {i}), ()
        case e.Stop(now=True):
            return replace(s, exited=True), (e.Exit(130),)
        case e.Stop():
            return replace(s, stopping=True), ()
        case _:
            return s, ()


def _group_done(s: State, group: e.GroupDone) -> tuple[State, tuple[e.Command, ...]]:
    if _outside_window(s, group.version):  # it was in flight across a publish
        return s, (e.Clear((group.key,)),)
    s = replace(s, equal_run=s.equal_run + 1 if group.equal else 0)
    # max_groups_ahead equal groups in a row: nothing to learn here, or a broken verifier. Continue with them.
    if s.settings.resample and group.equal and s.equal_run <= s.settings.max_groups_ahead:
        return s, (e.Resample((group.key,)),)
    return replace(s, buffer=s.buffer.append(Waiting(group.key, group.version))), ()


def _published(s: State, version: int) -> tuple[State, tuple[e.Command, ...]]:
    """Serve the version; groups whose version fell out of the window leave D (Algorithm 1: clear)."""
    s = replace(
        s,
        doing="",
        version=version,
        published_step=s.step,
        version_steps=in_window((*s.version_steps, (version, s.step)), s.settings.window),
        drifted=False,
    )
    gone = tuple(w.key for w in s.buffer if _outside_window(s, w.version))
    s = replace(s, buffer=Buffer(w for w in s.buffer if not _outside_window(s, w.version)) if gone else s.buffer)
    clear = (e.Clear(gone),) if gone else ()
    wake = () if s.settings.overlap else (e.Wake(("kv_cache",)),)
    return s, (*clear, *wake, e.Resume())


def in_window(version_steps: tuple[tuple[int, int], ...], window: int) -> tuple[tuple[int, int], ...]:
    """Of (version, step) pairs those of the last `window` steps that were published."""
    newest = sorted({step for _, step in version_steps})[-window:]
    return tuple(pair for pair in version_steps if pair[1] in newest)


def _outside_window(s: State, version: int) -> bool:
    return bool(s.version_steps) and all(version != v for v, _ in s.version_steps)


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
    """Due after L steps, past the drift bound, for the last evaluation, or when groups are needed and no engine serves.

    An engine that came back while others serve waits for the next publish that is due."""
    c = s.settings
    last = s.step >= c.steps
    can_serve = bool(s.serving)
    needed = not can_serve and (_evaluation_due(s) or (not last and _groups_needed(s) > 0))
    over = _window_over(s) and not (last and not c.evaluate)
    unseen = last and c.evaluate and s.evaluated < s.step
    if not c.engine or s.replay or (can_serve and s.published_step == s.step) or not (over or needed or unseen):
        return s, ()
    missing = len(s.engines) < c.engines if s.version < 0 else not s.engines
    if missing or (s.in_flight and c.drain):
        return s, ()
    if s.loaded and not c.overlap:
        return replace(s, loaded=False), (e.OffloadTrainer(),)
    if s.engines - s.awake:
        return replace(s, doing="wake", awake=s.engines), (e.Wake(("weights",)),)
    # A number is spent even if the publish fails. Who is lost from here on, and back before the end, does not serve.
    after = replace(s, doing="publish", next_version=s.next_version + 1, serving=s.engines)
    return after, (e.Pause(c.on_publish), e.Publish(s.next_version))


def _evaluation_due(s: State) -> bool:
    c = s.settings
    if not c.evaluate or s.evaluated >= s.step:
        return False
    between = c.evaluate_every and s.published_step == s.step and s.step - s.evaluated >= c.evaluate_every
    return s.step == 0 or s.step >= c.steps or bool(between)


def _evaluate(s: State) -> tuple[State, tuple[e.Command, ...]]:
    if not _evaluation_due(s) or not s.serving or s.published_step != s.step or s.in_flight:
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
    uses = c.max_uses * len(s.buffer) - s.buffer.uses
    distinct = c.groups_per_step - len(s.buffer) if steps else 0
    return max(0, distinct, -(-(steps * c.groups_per_step - uses) // c.max_uses))


def _train(s: State) -> tuple[State, tuple[e.Command, ...]]:
    """One optimizer step on the oldest groups; steps that a killed run had done come first, with the same groups."""
    c = s.settings
    if s.step >= c.steps or (_evaluation_due(s) and not s.replay):
        return s, ()
    if not s.replay:
        enough = c.groups_per_step if c.engine else 1  # a file's last step may be a smaller one
        if len(s.buffer) < enough or _window_over(s):
            return s, ()
        if c.engine and not c.overlap and (_groups_needed(s) or (s.in_flight and c.drain)):
            return s, ()
    if s.awake and not c.overlap:
        pause = (e.Pause(c.on_publish),) if s.in_flight else ()
        return replace(s, doing="sleep", awake=frozenset(), serving=frozenset()), (
            *pause,
            e.Sleep(("weights", "kv_cache")),
        )
    if not s.loaded:
        return replace(s, loaded=True), (e.LoadTrainer(),)
    if s.replay:
        keys, rest = s.replay[0], s.replay[1:]
        return replace(s, doing="train", replay=rest), (e.Train(s.step + 1, keys),)
    used, rest_buffer = s.buffer.take(c.groups_per_step)
    for w in used:
        if w.uses + 1 < c.max_uses:
            rest_buffer = rest_buffer.append(replace(w, uses=w.uses + 1))
    s = replace(s, doing="train", buffer=rest_buffer)
    return s, (e.Train(s.step + 1, tuple(w.key for w in used)),)


def _generate(s: State) -> tuple[State, tuple[e.Command, ...]]:
    c = s.settings
    if not c.engine or not s.serving or s.doing in ("publish", "evaluate") or s.stopping:
        return s, ()
    if s.step >= c.steps or _evaluation_due(s) or (_window_over(s) and c.drain):
        return s, ()
    needed = _groups_needed(s)
    n = min(needed + (c.spare if needed else 0) - s.in_flight, c.max_groups_ahead - s.in_flight - len(s.buffer))
    if n <= 0:
        return s, ()
    without = tuple(sorted(set(range(c.engines)) - s.serving)) if len(s.serving) < c.engines else ()
    return replace(s, in_flight=s.in_flight + n), (e.Submit(n, without),)
