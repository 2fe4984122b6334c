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

from dataclasses import replace

from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.buffer import Buffer, BufferedGroup
from oapl_engine.scheduler.state import State

Commands = tuple[e.Command, ...]


def step(state: State, event: e.Event) -> tuple[State, Commands]:
    """The next state and what to do now. The same events give the same commands."""
    if state.exited:
        return state, ()
    state, commands = _apply_event(state, event)
    while True:
        state, more = _next_commands(state)
        commands += more
        if not more or state.pending or state.exited:
            return state, commands


def _apply_event(s: State, event: e.Event) -> tuple[State, Commands]:
    match event:
        case e.GroupDone():
            return _group_done(_group_ended(s), event)
        case e.GroupInvalid():
            return _group_ended(s), ()
        case e.StepDone(step=done, kl=kl):
            exceeded = s.settings.max_kl is not None and kl is not None and kl > s.settings.max_kl
            return replace(s, pending="", step=done, kl_exceeded=exceeded), ()
        case e.Published(version):
            return _published(s, version)
        case e.PublishFailed():
            return replace(s, exited=True), (e.Exit(3),)
        case e.EngineSlept() | e.EngineWoke() | e.Interrupted():
            return replace(s, pending=""), ()
        case e.CheckpointDone(step=done):
            return replace(s, pending="", checkpointed=done), ()
        case e.EvaluationDone(step=done):
            return replace(s, pending="", evaluated=done), ()
        case e.EngineLost(id=i):
            return _engine_lost(s, i), ()
        case e.EngineReady(id=i):
            return replace(s, engines=s.engines | {i}, awake=s.awake | {i}), ()
        case e.Stop(now=True):
            return replace(s, exited=True), (e.Exit(130),)
        case e.Stop():
            return replace(s, stopping=True), ()
        case _:
            return s, ()


def _group_ended(s: State) -> State:
    return replace(s, in_flight=max(0, s.in_flight - 1))


def _group_done(s: State, group: e.GroupDone) -> tuple[State, Commands]:
    if _outside_window(s, group.version):  # it was in flight across a publish
        return s, (e.Clear((group.key,)),)
    s = replace(s, consecutive_equal=s.consecutive_equal + 1 if group.equal else 0)
    # max_groups_ahead equal groups in a row: nothing to learn here, or a broken verifier. Continue with them.
    if s.settings.resample and group.equal and s.consecutive_equal <= s.settings.max_groups_ahead:
        return s, (e.Resample((group.key,)),)
    return replace(s, buffer=s.buffer.append(BufferedGroup(group.key, group.version))), ()


def _engine_lost(s: State, i: int) -> State:
    return replace(s, engines=s.engines - {i}, awake=s.awake - {i}, serving=s.serving - {i})


def _published(s: State, version: int) -> tuple[State, Commands]:
    """Serve the version; groups whose version fell out of the window leave D (Algorithm 1: clear)."""
    s = replace(
        s,
        pending="",
        version=version,
        published_step=s.step,
        version_steps=in_window((*s.version_steps, (version, s.step)), s.settings.window),
        kl_exceeded=False,
    )
    gone = tuple(group.key for group in s.buffer if _outside_window(s, group.version))
    if gone:
        s = replace(s, buffer=Buffer(group for group in s.buffer if not _outside_window(s, group.version)))
    clear = (e.Clear(gone),) if gone else ()
    wake = () if s.settings.overlaps else (e.Wake(("kv_cache",)),)
    return s, (*clear, *wake, e.Resume())


def in_window(version_steps: tuple[tuple[int, int], ...], window: int) -> tuple[tuple[int, int], ...]:
    """Of (version, step) pairs those of the last `window` steps that were published."""
    newest = sorted({step for _, step in version_steps})[-window:]
    return tuple(pair for pair in version_steps if pair[1] in newest)


def _outside_window(s: State, version: int) -> bool:
    return bool(s.version_steps) and all(version != v for v, _ in s.version_steps)


def _next_commands(s: State) -> tuple[State, Commands]:
    """What the first rule that applies says. At most one long command is under way next to generation."""
    if s.pending:
        return _generate(s) if s.settings.overlaps else (s, ())
    for rule in (_stop, _checkpoint, _publish, _evaluate, _finish, _train, _generate):
        after, commands = rule(s)
        if commands or after is not s:
            return after, commands
    return s, ()


def _stop(s: State) -> tuple[State, Commands]:
    return _checkpoint_and_exit(s, 130) if s.stopping else (s, ())


def _checkpoint_and_exit(s: State, code: int) -> tuple[State, Commands]:
    if _not_checkpointed(s):
        return replace(s, pending="checkpoint"), (e.Checkpoint(s.step),)
    return replace(s, exited=True), (e.Exit(code),)


def _not_checkpointed(s: State) -> bool:
    return s.checkpointed < s.step


def _checkpoint(s: State) -> tuple[State, Commands]:
    every = s.settings.checkpoint_every
    due = s.step >= s.settings.steps or (s.step % every == 0 if every else _window_over(s))
    if not _not_checkpointed(s) or not due or s.replay:
        return s, ()
    return replace(s, pending="checkpoint"), (e.Checkpoint(s.step),)


def _window_over(s: State) -> bool:
    return s.settings.generates and (s.kl_exceeded or s.step - s.published_step >= s.settings.lag)


def _publish(s: State) -> tuple[State, Commands]:
    """Offload the trainer, wake the engine, pause it, publish: one of these at a time where memory is shared."""
    if not _publish_due(s) or _must_drain(s):
        return s, ()
    if _must_offload(s):  # before engines are asked for: one that died can only start where the trainer is not
        return replace(s, loaded=False, trainers_turn=False), (e.OffloadTrainer(),)
    if not _may_publish(s):
        return s, ()
    if _must_wake(s):
        return replace(s, pending="wake", awake=s.engines), (e.Wake(("weights",)),)
    # A number is spent even if the publish fails. An engine that is lost from here on, and back before the end, does
    # not serve.
    after = replace(s, pending="publish", next_version=_following_version(s), serving=s.engines)
    return after, (*_pause(s), e.Publish(s.next_version))


def _publish_due(s: State) -> bool:
    """After L steps, past the drift bound, for the last evaluation, or when groups are needed and no engine serves.

    An engine that came back while others serve waits for the next publish that is due."""
    c = s.settings
    last = s.step >= c.steps
    if not c.generates or s.replay or (s.serving and s.published_step == s.step):
        return False
    window_over = _window_over(s) and not (last and not c.evaluate)
    last_evaluation = last and c.evaluate and s.evaluated < s.step
    return window_over or last_evaluation or _engine_needed(s)


def _engine_needed(s: State) -> bool:
    """No engine serves, but one is needed to generate or to evaluate."""
    last = s.step >= s.settings.steps
    return not s.serving and (_evaluation_due(s) or (not last and _groups_needed(s) > 0))


def _may_publish(s: State) -> bool:
    """Engines are there (all of them the first time)."""
    return len(s.engines) >= s.settings.engines if s.version < 0 else bool(s.engines)


def _must_drain(s: State) -> bool:
    return bool(s.in_flight) and s.settings.drain


def _must_offload(s: State) -> bool:
    return (s.loaded or s.trainers_turn) and not s.settings.overlaps


def _must_wake(s: State) -> bool:
    return bool(s.engines - s.awake)


def _following_version(s: State) -> int:
    return s.next_version + 1


def _pause(s: State) -> Commands:
    return (e.Pause(s.settings.on_publish),)


def _evaluation_due(s: State) -> bool:
    c = s.settings
    if not c.evaluate or s.evaluated >= s.step:
        return False
    between = c.evaluate_every and s.published_step == s.step and s.step - s.evaluated >= c.evaluate_every
    return s.step == 0 or s.step >= c.steps or bool(between)


def _evaluate(s: State) -> tuple[State, Commands]:
    if not _evaluation_due(s) or not s.serving or s.published_step != s.step or _generating(s):
        return s, ()
    return replace(s, pending="evaluate"), (e.Evaluate(s.step),)


def _generating(s: State) -> bool:
    return s.in_flight > 0


def _finish(s: State) -> tuple[State, Commands]:
    exhausted = not s.settings.generates and not s.buffer and not s.replay
    if (s.step < s.settings.steps and not exhausted) or (s.settings.evaluate and s.evaluated < s.step):
        return s, ()
    return _checkpoint_and_exit(s, 0)


def _groups_needed(s: State) -> int:
    """Groups that the rest of this window will train and that are not in the buffer yet."""
    c = s.settings
    horizon = c.steps if c.overlaps else min(s.published_step + c.lag, c.steps)
    steps = max(0, horizon - s.step - len(s.replay))
    uses = c.max_uses * len(s.buffer) - s.buffer.uses
    distinct = c.groups_per_step - len(s.buffer) if steps else 0
    return max(0, distinct, -(-(steps * c.groups_per_step - uses) // c.max_uses))


def _train(s: State) -> tuple[State, Commands]:
    """One optimizer step on the oldest groups; steps that a killed run had done come first, with the same groups."""
    if not _may_train(s):
        return s, ()
    if _must_sleep(s):
        sleep = e.Sleep(("weights", "kv_cache"))
        asleep = replace(s, pending="sleep", awake=frozenset(), serving=frozenset(), trainers_turn=True)
        return asleep, (*_pause_to_sleep(s), sleep)
    if _must_load(s):
        return replace(s, loaded=True), (e.LoadTrainer(),)
    if s.replay:
        keys, rest = s.replay[0], s.replay[1:]
        return replace(s, pending="train", replay=rest), (e.Train(s.step + 1, keys),)
    used, buffer = _use_groups(s)
    return replace(s, pending="train", buffer=buffer), (e.Train(s.step + 1, tuple(group.key for group in used)),)


def _may_train(s: State) -> bool:
    c = s.settings
    if s.step >= c.steps or (_evaluation_due(s) and not s.replay):
        return False
    if s.replay:
        return True
    enough = c.groups_per_step if c.generates else 1  # a file's last step may be a smaller one
    if len(s.buffer) < enough or _window_over(s):
        return False
    return not c.generates or c.overlaps or not (_groups_needed(s) or _must_drain(s))


def _must_sleep(s: State) -> bool:
    """Even if no engine is awake: one that died may be starting, and takes its memory as it does."""
    return s.settings.generates and not s.settings.overlaps and (bool(s.awake) or not s.trainers_turn)


def _pause_to_sleep(s: State) -> Commands:
    return _pause(s) if s.in_flight else ()


def _must_load(s: State) -> bool:
    return not s.loaded


def _use_groups(s: State) -> tuple[tuple[BufferedGroup, ...], Buffer]:
    """The groups of the next step, and the buffer after it: a group that may be used again goes to its end."""
    used, buffer = s.buffer.take(s.settings.groups_per_step)
    for group in used:
        if group.uses + 1 < s.settings.max_uses:
            buffer = buffer.append(replace(group, uses=group.uses + 1))
    return used, buffer


def _generate(s: State) -> tuple[State, Commands]:
    c = s.settings
    if not c.generates or not s.serving or s.pending in ("publish", "evaluate") or s.stopping:
        return s, ()
    if s.step >= c.steps or _evaluation_due(s) or (_window_over(s) and c.drain):
        return s, ()
    needed = _groups_needed(s)
    n = min(needed + (c.oversampling if needed else 0) - s.in_flight, _groups_allowed(s))
    if n <= 0:
        return s, ()
    without = tuple(sorted(set(range(c.engines)) - s.serving)) if len(s.serving) < c.engines else ()
    return replace(s, in_flight=s.in_flight + n), (e.Submit(n, without),)


def _groups_allowed(s: State) -> int:
    """Groups that may still be admitted without being too far ahead of training."""
    return s.settings.max_groups_ahead - s.in_flight - len(s.buffer)
