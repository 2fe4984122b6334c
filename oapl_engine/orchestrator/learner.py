"""Learner: policy and optimizer of this rank; carries out Train, Checkpoint, LoadTrainer and OffloadTrainer."""

import os
from dataclasses import dataclass, field
from typing import Self

import torch

from oapl_engine.config import resolve_train_config
from oapl_engine.errors import ConfigError
from oapl_engine.orchestrator.recompute import recompute_behavior
from oapl_engine.orchestrator.run import Run
from oapl_engine.orchestrator.step_record import metrics_row, record_done, record_dropped
from oapl_engine.report.metrics import MetricsWriter
from oapl_engine.rollout_log.ledger import Ledger, explain_untrained
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.driver import Handler
from oapl_engine.trainer import checkpoint
from oapl_engine.trainer.attention import attention_kernel
from oapl_engine.trainer.loading import default_device, load_policy
from oapl_engine.trainer.objective import make_objective, normalizer
from oapl_engine.trainer.offload import move_trainer
from oapl_engine.trainer.optimizer import learning_rate, make_optimizer
from oapl_engine.trainer.packing import share_groups
from oapl_engine.trainer.policy import Policy
from oapl_engine.trainer.score import LogProbs, fill_logprobs, replace_behavior_logprob
from oapl_engine.trainer.selection import Recorded, StepSelection, exchange_groups, select_rollouts
from oapl_engine.trainer.step import StepResult, train_step


@dataclass
class Learner:
    """One optimizer step at a time, each journalled before and after.

    run:               directory, log, journal, ranks
    policy, optimizer: of this rank
    ledger:            where every token of this rank ended
    metrics:           writer of metrics.jsonl; None on all ranks but the first
    reference:         the start model, loaded where objective.reference_coefficient asks for it
    behavior:          recomputed behaviour log-probs by rollout key; empty: the engine's are used
    recorded_rewards:  offline: all rewards that were recorded for a group, by its id
    idle_steps:        steps in a row that trained nothing
    """

    run: Run
    policy: Policy
    optimizer: torch.optim.Optimizer
    ledger: Ledger
    metrics: MetricsWriter | None
    reference: Policy | None = None
    behavior: LogProbs = field(default_factory=dict)
    recorded_rewards: Recorded | None = None
    idle_steps: int = 0

    @classmethod
    def open(cls, run: Run) -> Self:
        """Policy and optimizer as they were at the run's newest checkpoint. Sets run.step and run.position."""
        recipe, model = run.recipe, run.model
        torch.set_num_threads(recipe.run.threads or len(os.sched_getaffinity(0)))
        torch.manual_seed(recipe.run.seed)
        run.display.show_phase("start", f"model {model.path}")
        newest = checkpoint.load_newest(run.directory / "checkpoints")
        if newest and newest.extra["world"] != run.ranks.world:
            raise ConfigError(
                f"{newest.path} was written by {newest.extra['world']} ranks, now there are {run.ranks.world}: start "
                f"torchrun with --nproc-per-node {newest.extra['world']}, or name a new run.dir"
            )
        train = resolve_train_config(recipe)
        policy = checkpoint.resume_policy(newest, model, train) if newest else load_policy(model, train)
        optimizer = make_optimizer(policy, recipe.optimizer)
        if newest:
            checkpoint.restore(newest, policy, optimizer)
            run.step, run.position = newest.step, newest.extra["position"]
        metrics = MetricsWriter(run.directory, recipe.report) if run.ranks.rank == 0 else None
        return cls(run, policy, optimizer, Ledger(run.log, run.journal), metrics)

    def handlers(self) -> dict[type, Handler]:
        return {
            e.Train: self.train,
            e.Checkpoint: self.checkpoint,
            e.LoadTrainer: self.load,
            e.OffloadTrainer: self.offload,
        }

    def load(self, _: e.LoadTrainer) -> None:
        """Before a window's first step, while π is still π_vllm: recompute behaviour log-probs if so configured."""
        self._move(default_device())
        if self.run.recipe.objective.behavior == "recomputed":
            self.behavior = recompute_behavior(self.run, self.policy)

    def offload(self, _: e.OffloadTrainer | None = None) -> None:
        """Leave the device to the engine: the trainer's state stays in host memory until LoadTrainer."""
        self._move(torch.device("cpu"))

    def train(self, command: e.Train) -> e.StepDone:
        """One optimizer step. In order: select rollouts, pack, forward and backward, step, journal, metrics."""
        run = self.run
        groups = replace_behavior_logprob(run.local_groups(command.keys), self.behavior)
        if run.ranks.world > 1:
            groups = exchange_groups(run.ranks, groups, command.keys)
        run.display.show_phase("train", f"on {len(groups)} groups")
        run.journal.intent(command.step, run.version, command.keys)
        with run.stopwatch.measure("train"):
            selection = select_rollouts(
                groups, run.recipe.objective, run.recipe.sampling.max_new_tokens, self.recorded_rewards
            )
            result = self._optimize(command.step, selection)
        run.step = command.step
        record_dropped(run, selection, result)
        record_done(run, self.policy, command, selection, result)
        row = metrics_row(run, self.ledger, groups, selection, result)
        self.idle_steps = 0 if result and result.stepped else self.idle_steps + 1
        if self.idle_steps == min(run.recipe.schedule.lag, run.recipe.schedule.steps):
            why = explain_untrained(self.ledger)
            run.display.say(f"warning: {self.idle_steps} steps in a row trained nothing: {why}")
        if self.metrics:
            run.display.show_step(self.metrics.write(row))
        log_ratio = result.metrics["log_ratio/mean"] if result and result.stepped else None
        # The rollouts are samples of π_vllm, so the mean of ln π_vllm - ln π over them estimates KL(π_vllm‖π).
        return e.StepDone(command.step, None if log_ratio is None else -log_ratio)

    def checkpoint(self, command: e.Checkpoint) -> e.CheckpointDone:
        """Written by rank 0; the position is the earliest that any rank still has to look at."""
        run = self.run
        run.display.show_phase("checkpoint", f"step {command.step}")
        position = min(run.ranks.gather(run.position))
        if run.ranks.rank == 0:
            checkpoint.save(
                run.directory / "checkpoints",
                command.step,
                self.policy,
                self.optimizer,
                extra={"position": position, "world": run.ranks.world},
                keep=run.recipe.checkpoint.keep,
            )
        return e.CheckpointDone(command.step)

    def why_untrained(self) -> str | None:
        """None where a step of this run has changed the weights; else where the tokens went."""
        return None if self.run.journal.uses() else explain_untrained(self.ledger)

    def _move(self, device: torch.device) -> None:
        attention = self.run.model.attention if device.type == "cuda" else "sdpa"
        moved = 0
        for policy, optimizer in ((self.policy, self.optimizer), (self.reference, None)):
            if policy is not None and policy.device != device:
                moved += move_trainer(policy, optimizer, device)
                policy.kernel = attention_kernel(attention, device, policy.matmul_dtype)
        if moved:
            self.run.display.show_phase("move", f"{moved / 2**30:.1f} GiB of trainer state to {device.type}")

    def _optimize(self, step: int, selection: StepSelection) -> StepResult | None:
        """None where every group was dropped by rule: the step counts, the weights stay."""
        if not selection.groups:
            return None
        r, ranks = self.run.recipe, self.run.ranks
        objective = make_objective(r.objective, selection.beta2)
        own = share_groups(selection.groups, ranks)
        batches = self.policy.batches(own, r.train.token_budget, r.train.share_prompts)
        for need in objective.needs:
            policy = self._load_reference() if need == "reference_logprob" else self.policy
            batches = fill_logprobs(need, policy, batches, r.sampling.temperature)
        return train_step(
            self.policy,
            self.optimizer,
            batches,
            objective,
            learning_rate=learning_rate(r.optimizer, step - 1, r.schedule.steps),
            normalizer=normalizer(objective, len(selection.keys), selection.tokens, r.sampling.max_new_tokens),
            temperature=r.sampling.temperature,
            clip_norm=r.optimizer.clip_norm,
            entropy_coefficient=r.objective.entropy_coefficient,
            nonfinite=r.train.nonfinite,
            ranks=ranks,
        )

    def _load_reference(self) -> Policy:
        if self.reference is None:
            self.reference = load_policy(self.run.model, resolve_train_config(self.run.recipe))
            self.reference.model.requires_grad_(False)
        return self.reference
