"""[schedule] of a recipe: its modes, its fields, and what follows from them."""

from typing import ClassVar, Literal, NamedTuple

from pydantic.dataclasses import dataclass

from oapl_engine.config_file import STRICT, setting


class Mode(NamedTuple):
    """What a schedule.mode means; nothing else looks at its name.

    generates: a live engine samples rollouts; otherwise they come from a file.
    overlaps: generation continues while the trainer works, on other devices or cores.
    every_step: weights are published after each optimizer step (L = 1).
    unread: sections and fields of the recipe that nothing looks at; a recipe that sets one means something else.
    """

    generates: bool
    overlaps: bool
    every_step: bool
    unread: tuple[str, ...] = ()


WITHOUT_ENGINE = (
    "data.template",
    "data.max_prompt_tokens",
    "data.held_out",
    "reward",
    "rollout",
    "weights",
    "schedule.lag",
    "schedule.max_kl",
    "schedule.on_publish",
    "schedule.window",
    "schedule.max_groups_ahead",
    "evaluation.every",
    "evaluation.task",
    "evaluation.k",
    "evaluation.temperature",
    "evaluation.correct",
)
MODES = {
    "sync": Mode(generates=True, overlaps=False, every_step=True, unread=("schedule.max_kl",)),
    "phased": Mode(generates=True, overlaps=False, every_step=False),
    "async": Mode(generates=True, overlaps=True, every_step=False),
    "offline": Mode(generates=False, overlaps=False, every_step=False, unread=WITHOUT_ENGINE),
}


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    """Algorithm 1: when to generate, train and publish."""

    MOVED: ClassVar = {
        "credit": "is now schedule.max_groups_ahead",
        "allowance": "is now schedule.max_uses",
    }

    mode: Literal["sync", "phased", "async", "offline"] = setting(
        "phased", "phased alternates on one device; async overlaps; offline reads finished rollouts"
    )
    steps: int = setting(100, "optimizer steps of the complete run", ge=1)
    groups_per_step: int = setting(8, "groups (prompts) in an optimizer step", ge=1)
    group_size: int = setting(8, "G, rollouts per prompt; 2 or more for a group baseline", ge=1)
    lag: int = setting(16, "L, optimizer steps between publishes; sync means 1", ge=1)
    max_kl: float | None = setting(None, "publish early past this KL, nats per token", gt=0)
    on_publish: Literal["drain", "abort", "keep"] = setting(
        "drain",
        "groups in flight at a publish are waited for, ended, or kept (they continue under the new version); "
        "phased with abort or keep: those of max_groups_ahead over lag x groups_per_step, so that none waits for the "
        "slowest",
    )
    window: int = setting(0, "policy versions kept for training; 0: 1, or 2 in async and keep", ge=0)
    max_groups_ahead: int = setting(0, "groups generated ahead of training at most; 0: lag x groups_per_step", ge=0)
    max_uses: int = setting(1, "optimizer steps that may use one rollout (epochs in offline mode)", ge=1)

    @property
    def traits(self) -> Mode:
        return MODES[self.mode]

    @property
    def keeps_window(self) -> bool:
        """Whether groups in flight at a publish are trained afterwards, under a later version."""
        alternates = self.traits.generates and not self.traits.overlaps and not self.traits.every_step
        return self.traits.overlaps or (alternates and self.on_publish == "keep")

    @property
    def resolved_lag(self) -> int:
        """L; without an engine nothing is published, and the complete run is one window."""
        return self.lag if self.traits.generates else self.steps

    @property
    def resolved_window(self) -> int:
        return self.window or (2 if self.keeps_window else 1)

    @property
    def resolved_groups_ahead(self) -> int:
        return self.max_groups_ahead or self.resolved_lag * self.groups_per_step
