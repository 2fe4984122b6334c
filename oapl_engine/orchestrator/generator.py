"""Generator: admits prompts, makes groups durable as they arrive; carries out Submit, Pause, Resume, Sleep, Wake."""

import contextlib
import json
import time

from oapl_engine.data.task import Task
from oapl_engine.errors import ConfigError, RunError
from oapl_engine.files import replace_text
from oapl_engine.inference.client import EngineLostError
from oapl_engine.inference.protocol import Sampling
from oapl_engine.orchestrator.engine_events import EngineEvents
from oapl_engine.orchestrator.run import Run
from oapl_engine.rollout.prompt_queue import PromptQueue
from oapl_engine.rollout.session import EngineSession
from oapl_engine.samples import Group
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.driver import Handler
from oapl_engine.trainer.loading import read_text_config


class Generator:
    """Prompts of this rank into its engine, groups into its log. A group is durable before the scheduler hears of it.

    run, session, events:  what it works with
    sampling:              how responses are drawn
    prompts:               this rank's prompts and those in flight
    groups_assigned:       groups of all Submits so far, on all ranks
    last_lost_reported:    incarnation of the engine whose death was reported by a group of its own
    generation_started:    time.monotonic() of the last Submit
    """

    def __init__(self, run: Run, session: EngineSession, events: EngineEvents, task: Task, sampling: Sampling) -> None:
        self.run = run
        self.session = session
        self.events = events
        self.prompts = PromptQueue(task, run.position, run.log.group_keys(), run.ranks)
        self.sampling = sampling
        self.groups_assigned = 0
        self.last_lost_reported = -1
        self.generation_started = 0.0

    def handlers(self) -> dict[type, Handler]:
        control, run_if_alive = self.session.control, self.events.run_if_alive
        return {
            e.Submit: self.submit,
            e.Pause: lambda command: run_if_alive(lambda: control.pause(command.mode)),
            e.Resume: lambda command: run_if_alive(control.resume),
            e.Sleep: self.sleep,
            e.Wake: self.wake,
            e.Checkpoint: self.keep_position,
        }

    def submit(self, command: e.Submit) -> None:
        """Admit this rank's share of the prompts."""
        self.generation_started = time.monotonic()
        for _ in range(self._share(command)):
            key, attempt = self.prompts.admit(self.session.incarnation)
            group_size = self.run.recipe.schedule.group_size
            self.session.submit(attempt.prompt, key, group_size, self.sampling, self._on_group)
        self._show_progress()

    def sleep(self, command: e.Sleep) -> e.Event | None:
        """Count what the engine generated, then give its memory to the trainer."""
        with contextlib.suppress(EngineLostError):
            self.run.count_engine_tokens(self.session)

        def work() -> e.Event:
            self.session.sleep(command.tags)
            return e.EngineSlept()

        return self.events.run_or_interrupt(work)

    def wake(self, command: e.Wake) -> e.Event | None:
        """The scheduler waits for the weights; the KV cache, after a publish, has no answer."""
        if "weights" not in command.tags:
            self.events.run_if_alive(lambda: self.session.wake(command.tags))
            return None

        def work() -> e.Event:
            self.session.wake(command.tags)
            return e.EngineWoke()

        return self.events.run_or_interrupt(work)

    def keep_position(self, _: e.Checkpoint) -> None:
        """Stands before Learner's handler, which writes the position into the checkpoint."""
        self.run.position = self.prompts.first_unfinished()

    def _share(self, command: e.Submit) -> int:
        """Groups of a Submit are assigned in turn to all ranks whose engine serves."""
        serving = [rank for rank in range(self.run.ranks.world) if rank not in command.without]
        first, self.groups_assigned = self.groups_assigned, self.groups_assigned + command.n
        own = self.run.ranks.rank
        return sum(serving[i % len(serving)] == own for i in range(first, self.groups_assigned))

    def _on_group(self, group: Group) -> None:
        """On the collector's thread: make the group durable, then report it. Raises RunError."""
        self._refuse_future_version(group)
        self.run.log.append(group)
        attempt = self.prompts.end(group.id)
        if not self.prompts.in_flight():
            self.run.stopwatch.add("generate", time.monotonic() - self.generation_started)
        lost = any(rollout.status == "lost" for rollout in group.rollouts)
        if lost:
            self.prompts.retry(attempt)
            if self.last_lost_reported < attempt.incarnation == self.session.incarnation:
                self.last_lost_reported = attempt.incarnation
                self.events.lost()  # before the group: the scheduler must not submit to this engine again yet
        scored = group.scored()
        if lost or len(scored) < 2:
            self._report_invalid(group, lost)
        else:
            self.session.confirm_healthy()
            self._report_done(group)
        self._show_progress()

    def _refuse_future_version(self, group: Group) -> None:
        newest = max((span.version for rollout in group.rollouts for span in rollout.spans), default=0)
        if newest > self.run.version:
            raise RunError(
                f"group {group.id} holds tokens of version {newest}, from the future: the newest that was published is "
                f"{self.run.version}; nothing else may publish to this engine"
            )

    def _report_invalid(self, group: Group, lost: bool) -> None:
        scored = group.scored()
        column = "lost" if lost else "dropped:group_too_small"
        reason = "its engine died" if lost else f"{len(scored)} of {len(group.rollouts)} rollouts scored"
        self.run.journal.dispose(dict.fromkeys((rollout.key for rollout in scored), column))
        self.events.inbox.put(e.GroupInvalid(group.id, reason))

    def _report_done(self, group: Group) -> None:
        now = time.time()
        verify_seconds = max(0.0, now - max(rollout.finished_ns for rollout in group.rollouts) / 1e9)
        self.events.inbox.put(
            e.GroupDone(
                key=group.id,
                tokens=sum(rollout.response_tokens for rollout in group.rollouts),
                version=group.version,
                equal=len({rollout.reward for rollout in group.scored()}) == 1,
                verify_seconds=round(verify_seconds, 4),
                done_at=round(now, 4),
            )
        )

    def _show_progress(self) -> None:
        waiting = self.prompts.in_flight()
        self.run.display.show_phase("generate", f"{waiting} groups to go" if waiting else "done")


def context_length(run: Run) -> int:
    """Tokens of prompt and response: what the recipe asks for, or the positions of the model if fewer. ConfigError."""
    data, sampling = run.recipe.data, run.recipe.sampling
    wanted = data.max_prompt_tokens + sampling.max_new_tokens
    positions = read_text_config(run.model.path).get("max_position_embeddings") or wanted
    if sampling.max_new_tokens >= positions:
        raise ConfigError(
            f"sampling.max_new_tokens = {sampling.max_new_tokens}: {run.model.path} has {positions} positions for "
            "prompt and response together; lower it"
        )
    return min(wanted, positions)


def report_dropped(run: Run, task: Task, limit: int) -> None:
    """Say how many prompts were over the limit, and keep their ids and lengths in dropped_prompts.json."""
    if task.dropped:
        path = run.directory / "dropped_prompts.json"
        replace_text(path, json.dumps(task.dropped, indent=1) + "\n")
        run.display.say(f"{len(task.dropped)} prompts over data.max_prompt_tokens = {limit} were left out: {path}")
