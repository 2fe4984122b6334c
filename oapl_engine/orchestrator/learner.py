"""The learning half of a run: carries out Train, Clear, Resample, Checkpoint, LoadTrainer and OffloadTrainer."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from oapl_kernels.weight_pack import checksum_all, combined

from oapl_engine.config import ModelConfig, Recipe, resolve_train_config
from oapl_engine.distributed import ALONE, Ranks
from oapl_engine.errors import ConfigError, RunError
from oapl_engine.report.display import Display
from oapl_engine.report.metrics import MetricsWriter
from oapl_engine.report.stopwatch import Stopwatch
from oapl_engine.rollout_log.interchange import Limits, read_rollouts
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.ledger import Ledger
from oapl_engine.rollout_log.log import RolloutLog
from oapl_engine.samples import Group
from oapl_engine.scheduler import events as e
from oapl_engine.trainer import checkpoint
from oapl_engine.trainer.attention import attention_kernel
from oapl_engine.trainer.objective import make_objective, needs_proximal, normalizer
from oapl_engine.trainer.offload import move_trainer
from oapl_engine.trainer.optimizer import learning_rate, make_optimizer
from oapl_engine.trainer.packing import share_items
from oapl_engine.trainer.policy import Policy, default_device, load_policy
from oapl_engine.trainer.score import LogProbs, fill_logprobs, score
from oapl_engine.trainer.selection import StepSelection, exchange_groups, replace_behavior_logprob, select_rollouts
from oapl_engine.trainer.step import StepResult, train_step


def open_learner(
    recipe: Recipe, model: ModelConfig, run_dir: Path, display: Display, ranks: Ranks = ALONE
) -> "Learner":
    """Policy, optimizer and files of a run, as they were at its newest checkpoint. model: with a resolved path."""
    torch.set_num_threads(recipe.run.threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(recipe.run.seed)
    make_objective(recipe.objective, recipe.objective.beta2)  # a wrong name or switch is told before anything is loaded
    display.show_phase("start", f"model {model.path}")
    newest = checkpoint.load_newest(run_dir / "checkpoints")
    if newest and newest.extra["world"] != ranks.world:
        raise ConfigError(
            f"{newest.path} was written by {newest.extra['world']} ranks, now there are {ranks.world}: start torchrun "
            f"with --nproc-per-node {newest.extra['world']}, or name a new run.dir"
        )
    train = resolve_train_config(recipe)
    policy = checkpoint.resume_policy(newest, model, train) if newest else load_policy(model, train)
    optimizer = make_optimizer(policy, recipe.optimizer)
    if newest:
        checkpoint.restore(newest, policy, optimizer)
    journal = Journal(run_dir / f"journal{ranks.suffix}.sqlite")
    return Learner(
        *(recipe, model, run_dir, policy, optimizer, ranks),
        log=RolloutLog(run_dir / "rollouts" / f"rank{ranks.rank}.sqlite"),
        journal=journal,
        metrics=MetricsWriter(run_dir, recipe.report) if ranks.rank == 0 else None,
        display=display,
        stopwatch=Stopwatch(),
        step=newest.step if newest else 0,
        position=newest.extra["position"] if newest else 0,
        version=max((version for version, _ in journal.versions()), default=0),
    )


@dataclass
class Learner:
    """Policy, optimizer and the files that make a step durable. `published`: what the last publish measured.

    position: in the order of prompts, as the checkpoint had it; first_unfinished: the generator's, for the next one;
    before_offload: called while π is still on its device. metrics: None on all ranks but the first."""

    recipe: Recipe
    model: ModelConfig
    run_dir: Path
    policy: Policy
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    log: RolloutLog
    journal: Journal
    metrics: MetricsWriter | None
    display: Display
    stopwatch: Stopwatch
    step: int = 0
    position: int = 0
    first_unfinished: Callable[[], int] = lambda: 0
    before_offload: Callable[[], None] = lambda: None
    version: int = 0
    recorded_rewards: Mapping[str, NDArray[np.float64]] | None = None
    published: dict[str, float | None] = field(default_factory=dict)
    reference: Policy | None = None
    behavior: LogProbs = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.log, self.journal)

    def handlers(self) -> dict[type, Any]:
        return {
            e.Train: self.train,
            e.Clear: lambda c: self.dispose(c.keys, "cleared"),
            e.Resample: lambda c: self.dispose(c.keys, "dropped:resampled"),
            e.Checkpoint: self.checkpoint,
            e.LoadTrainer: self.load,
            e.OffloadTrainer: self.offload,
        }

    def import_rollouts(self) -> None:
        """Offline: put the rollouts of the recipe's file into the log. Raises ConfigError."""
        r = self.recipe
        stops = tuple(r.sampling.stop_token_ids)
        limits = Limits(self.policy.vocabulary, r.sampling.max_new_tokens, stops, r.schedule.group_size)
        file = read_rollouts(r.data.path, limits, self.policy.tokenizer)
        if not file.has_behavior and r.objective.behavior == "engine":
            raise ConfigError(f'{r.data.path} has no behaviour log-probs: set objective.behavior = "recomputed"')
        uses = r.schedule.steps * r.schedule.groups_per_step
        if uses > len(file.groups) * r.schedule.max_uses:
            raise ConfigError(
                f"schedule.steps = {r.schedule.steps} x groups_per_step = {r.schedule.groups_per_step} needs {uses} "
                f"groups; {r.data.path} has {len(file.groups)} and schedule.max_uses = {r.schedule.max_uses}: lower "
                "steps, or raise max_uses (epochs)"
            )
        self.recorded_rewards = file.recorded_rewards
        stored = set(self.log.group_keys())
        for group in file.groups[self.ranks.rank :: self.ranks.world]:
            if group.id not in stored:
                self.log.append(group)
        self.display.say(f"{len(file.groups)} groups from {r.data.path}")

    def load(self, _: e.LoadTrainer) -> None:
        """Before a window's first step, while π is still π_vllm: recompute behaviour log-probs if so configured."""
        self._move(default_device())
        if self.recipe.objective.behavior == "recomputed":
            self.behavior = self._recomputed()

    def offload(self, _: e.OffloadTrainer) -> None:
        """Leave the device to the engine."""
        self.before_offload()
        self.leave_device()

    def leave_device(self) -> None:
        """Keep the trainer's state in host memory until LoadTrainer."""
        self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        moved = move_trainer(self.policy, self.optimizer, device)
        if moved:
            self.policy.kernel = attention_kernel(
                self.model.attention if device.type == "cuda" else "sdpa", device, self.policy.matmul_dtype
            )
            self.display.show_phase("move", f"{moved / 2**30:.1f} GiB of trainer state to {device.type}")

    def train(self, command: e.Train) -> e.StepDone:
        """One optimizer step, journalled before and after."""
        groups = replace_behavior_logprob(self._held(command.keys), self.behavior)
        groups = exchange_groups(self.ranks, groups, command.keys) if self.ranks.world > 1 else groups
        self.display.show_phase("train", f"on {len(groups)} groups")
        self.journal.intent(command.step, self.version, command.keys, f"{torch.initial_seed()}")
        with self.stopwatch.measure("train"):
            data = select_rollouts(
                groups, self.recipe.objective, self.recipe.sampling.max_new_tokens, self.recorded_rewards
            )
            result = self._optimize(command.step, data)
        self.step = command.step
        dropped = dict(data.dropped)
        if result and not result.stepped:
            dropped |= dict.fromkeys(data.keys, "nonfinite")
            self.display.say(f"step {command.step} skipped: {result.reason}")
        self.journal.dispose({key: f"dropped:{rule}" for key, rule in dropped.items()})
        used = list(data.keys) if result and result.stepped else []
        self._journal_done(command, used)
        row = self._row(groups, data, result)
        if self.metrics:
            self.display.show_step(self.metrics.write(row))
        ratio = result.metrics["log_ratio/mean"] if result and result.stepped else None
        # The rollouts are samples of π_vllm, so the mean of ln π_vllm - ln π over them estimates KL(π_vllm‖π).
        return e.StepDone(command.step, None if ratio is None else -ratio)

    def _journal_done(self, command: e.Train, used: list[str]) -> None:
        weights = [p.detach().contiguous() for p in self.policy.trainable().values()]
        found = combined(checksum_all(weights))
        before = self.journal.done(command.step, self.version, command.keys, used, found)
        if before != found:
            self.display.say(
                f"step {command.step}, replayed, gave weights {found} where it gave {before} before: another "
                "instruction set, number of threads or version of a library; the run goes on with the new ones"
            )

    def _held(self, keys: Sequence[str]) -> list[Group]:
        """Of these groups the ones in this rank's log. Alone it must have all: KeyError."""
        if self.ranks.world == 1:
            return self.log.groups(keys)
        stored = set(self.log.group_keys())
        return self.log.groups(key for key in keys if key in stored)

    def _optimize(self, step: int, data: StepSelection) -> StepResult | None:
        """None where every group was dropped by rule: the step counts, the weights stay."""
        if not data.items:
            return None
        r = self.recipe
        objective = make_objective(r.objective, data.beta2)
        batches = self.policy.batches(share_items(data.items, self.ranks), r.train.token_budget, r.train.share_prompts)
        if needs_proximal(objective):
            batches = fill_logprobs("proximal_logprob", self.policy, batches, r.sampling.temperature)
        if r.objective.reference_coefficient:
            batches = fill_logprobs("reference_logprob", self._reference(), batches, r.sampling.temperature)
        return train_step(
            self.policy,
            self.optimizer,
            batches,
            objective,
            learning_rate=learning_rate(r.optimizer, step - 1, r.schedule.steps),
            normalizer=normalizer(r.objective, len(data.keys), data.tokens, r.sampling.max_new_tokens),
            temperature=r.sampling.temperature,
            clip_norm=r.optimizer.clip_norm,
            entropy_coefficient=r.objective.entropy_coefficient,
            beta2=data.beta2 if r.objective.name in ("oapl", "kimi") else None,
            nonfinite=r.train.nonfinite,
            ranks=self.ranks,
        )

    def _reference(self) -> Policy:
        if self.reference is None:
            self.reference = load_policy(self.model, resolve_train_config(self.recipe))
            self.reference.model.requires_grad_(False)
        return self.reference

    def _row(self, groups: list[Group], data: StepSelection, result: StepResult | None) -> dict[str, Any]:
        step_of = dict(self.journal.versions())
        lags = [self.step - 1 - step_of.get(g.version, 0) for g in groups]
        own_tokens = self.journal.engine_tokens()
        accounts = self.ranks.gather([self.ledger.read(own_tokens), own_tokens, self.ledger.generated()])
        columns: Counter[str] = sum((Counter(account[0]) for account in accounts), Counter())
        engine_tokens = None if own_tokens is None else sum(account[1] for account in accounts)
        return {
            **data.metrics,
            **(result.metrics if result else {}),
            **self.published,
            **self.stopwatch.take(),
            "step": self.step,
            "policy_version": self.version,
            "off_policy/min": min(lags),
            "off_policy/mean": float(np.mean(lags)),
            "off_policy/max": max(lags),
            "tokens/generated": sum(account[2] for account in accounts),
            "tokens/engine": engine_tokens,
            "ledger": {**accounts[0][0], **columns},
            "beta2": data.beta2,
            "learning_rate": learning_rate(self.recipe.optimizer, self.step - 1, self.recipe.schedule.steps),
        }

    def dispose(self, keys: Sequence[str], column: str) -> None:
        """Groups that will not be trained: their scored rollouts end in this column of the ledger."""
        scored = (r.key for group in self._held(keys) for r in group.scored())
        self.journal.dispose(dict.fromkeys(scored, column))

    def checkpoint(self, command: e.Checkpoint) -> e.CheckpointDone:
        self.display.show_phase("checkpoint", f"step {command.step}")
        position = min(self.ranks.gather(self.first_unfinished()))
        if self.ranks.rank == 0:
            checkpoint.save(
                *(self.run_dir / "checkpoints", command.step, self.policy, self.optimizer),
                *({"position": position, "world": self.ranks.world}, self.recipe.checkpoint.keep),
            )
        return e.CheckpointDone(command.step)

    def score(self, groups: Sequence[Group], temperature: float) -> LogProbs:
        """Log-probs of rollouts under the policy as it is (trainer.score)."""
        budget, share = self.recipe.train.token_budget, self.recipe.train.share_prompts
        return score(self.policy, groups, temperature=temperature, token_budget=budget, share_prompts=share)

    def _recomputed(self) -> LogProbs:
        """Log-probs of all waiting rollouts under π_vllm, kept on disk: after the first step π is no longer π_vllm."""
        published = max((step for _, step in self.journal.versions()), default=0)
        path = self.run_dir / "behavior" / f"step_{published:06d}{self.ranks.suffix}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
        if self.step != published:
            raise RunError(
                f"{path} is missing, and π at step {self.step} is not the policy that generated the rollouts (step "
                f'{published}): start in a new run.dir, or with objective.behavior = "engine"'
            )
        used = self.journal.uses()
        groups = [g for g in map(self.log.group, self.log.group_keys()) if not any(r.key in used for r in g.rollouts)]
        self.display.show_phase("rescore", f"{len(groups)} groups")
        logprobs = self.score(groups, self.recipe.sampling.temperature)
        path.parent.mkdir(exist_ok=True)
        np.savez(path.with_suffix(".tmp.npz"), **logprobs)  # type: ignore[arg-type]
        path.with_suffix(".tmp.npz").rename(path)
        return logprobs
