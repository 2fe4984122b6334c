"""What the scheduler knows: the recipe's settings, and the state that its decisions rest on."""

from dataclasses import dataclass, field
from typing import Self

from oapl_engine.config import Recipe
from oapl_engine.scheduler.buffer import Buffer


@dataclass(frozen=True)
class Settings:
    """What the recipe says about time.

    generates:         a live engine samples rollouts; else the buffer holds those of a file
    overlaps:          generation continues while the trainer works
    steps:             optimizer steps of the run
    groups_per_step:   groups in an optimizer step
    lag:               L, optimizer steps between publishes
    window:            versions kept for training
    max_groups_ahead:  groups generated ahead of training at most
    max_uses:          optimizer steps that may use one group
    on_publish:        drain | abort | keep, what happens to groups in flight at a publish
    max_kl:            publish early past this KL(π_vllm‖π), nats per token; None: off
    checkpoint_every:  optimizer steps; 0: at each publish and at the end
    evaluate:          whether there are evaluations
    evaluate_every:    optimizer steps; 0: before and after training only
    engines:           of all ranks together
    resample:          groups of equal rewards are replaced by other prompts
    """

    generates: bool
    overlaps: bool
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

    @classmethod
    def from_recipe(cls, recipe: Recipe, engines: int = 1) -> Self:
        """Settings of a recipe with the automatic values filled in."""
        s = recipe.schedule
        return cls(
            generates=s.traits.generates,
            overlaps=s.traits.overlaps,
            steps=s.steps,
            groups_per_step=s.groups_per_step,
            lag=s.resolved_lag,
            window=s.resolved_window,
            max_groups_ahead=s.resolved_groups_ahead,
            max_uses=s.max_uses,
            on_publish=s.on_publish,
            max_kl=s.max_kl,
            checkpoint_every=recipe.checkpoint.every,
            evaluate=recipe.evaluation.n > 0 and s.traits.generates,
            evaluate_every=recipe.evaluation.every,
            engines=engines,
            resample=recipe.objective.equal_groups == "resample",
        )

    @property
    def drain(self) -> bool:
        return self.on_publish == "drain"

    @property
    def oversampling(self) -> int:
        """Groups generated beyond what a phase trains, so that it need not wait for the slowest."""
        if self.drain or self.overlaps:
            return 0
        return max(0, self.max_groups_ahead - self.lag * self.groups_per_step)


@dataclass(frozen=True)
class State:
    """Everything a decision rests on.

    step:               optimizer steps done
    version:            that serves; -1: this process has not published yet
    next_version:       number of the next publish
    published_step:     step of the newest publish
    version_steps:      (version, step) of the versions in the window
    buffer:             groups that may be trained
    in_flight:          groups that are being generated or verified
    consecutive_equal:  groups of equal rewards in a row
    replay:             groups of the steps that a killed run had begun, to be trained again first
    pending:            the long command that is being carried out; "" if none
    engines:            those that are up
    awake:              of these, those that hold their memory
    serving:            of these, those that hold `version`
    trainers_turn:      on a shared device: from Sleep to OffloadTrainer; no engine starts meanwhile
    loaded:             whether the trainer's state is on its device
    evaluated:          step of the newest evaluation
    checkpointed:       step of the newest checkpoint
    kl_exceeded:        the last step measured a KL beyond max_kl
    stopping, exited:   after Stop; after Exit

    engines, awake and serving change with the command, not with its answer: an engine that died and came back in
    between is then not mistaken for one that stayed.
    """

    settings: Settings
    step: int = 0
    version: int = -1
    next_version: int = 0
    published_step: int = 0
    version_steps: tuple[tuple[int, int], ...] = ()
    buffer: Buffer = field(default_factory=Buffer)
    in_flight: int = 0
    consecutive_equal: int = 0
    replay: tuple[tuple[str, ...], ...] = ()
    pending: str = ""
    engines: frozenset[int] = frozenset()
    awake: frozenset[int] = frozenset()
    serving: frozenset[int] = frozenset()
    trainers_turn: bool = False
    loaded: bool = False
    evaluated: int = -1
    checkpointed: int = 0
    kl_exceeded: bool = False
    stopping: bool = False
    exited: bool = False
