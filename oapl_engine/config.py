"""The recipe: frozen dataclasses, one per TOML section, every rule about a field next to it.

`load_recipe(path, overrides)` reads TOML, lays `--section.field value` over it and validates. What is wrong raises
`ConfigError` (exit code 2): the field, its value, what is allowed, the nearest valid name.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from oapl_engine.config_file import STRICT, apply_overrides, build, overridden_fields, read_toml, setting
from oapl_engine.errors import ConfigError
from oapl_engine.schedule_config import ScheduleConfig


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Directory of a run, and what makes the run repeatable."""

    dir: str = setting("", 'run directory; the same command again resumes it. Empty: "runs/" + recipe name')
    seed: int = setting(0, "seed of data order, sampling and initial state", ge=0, lt=2**31)
    threads: int = setting(0, "torch threads of the trainer; 0: every core this process may use", ge=0)


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The policy: any transformers causal LM."""

    path: str = setting("", "folder in Hugging Face layout, or hub name; required")
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the master weights; float32 keeps small updates from rounding away"
    )
    attention: Literal["auto", "sdpa", "flash"] = setting(
        "auto", "packed attention; auto: flash-attn or torch varlen on CUDA, SDPA per segment on CPU"
    )
    lora_rank: int = setting(0, "rank of LoRA adapters on all linear layers; 0: full fine-tuning", ge=0)


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where prompts come from. In offline mode: the file of rollouts to train on."""

    source: str = setting(
        "reasoning_gym",
        "micro (generated sort / addition) | reasoning_gym | jsonl | hf | benchmark (aime25, math500, …, from the hub "
        "or data.path) | parquet (rollouts, offline mode; jsonl holds them too) | package.module:factory",
    )
    task: str = setting("", "task name within the source (reasoning-gym data set, micro task, hub data set)")
    path: str = setting("", "file for jsonl, parquet and (optional) benchmark")
    options: dict[str, Any] = setting({}, "passed to the task (size, difficulty, …)")
    template: str = setting(
        "chat", '"chat": the tokenizer\'s chat template; "raw": the question; else text with {question}'
    )
    system: str = setting("", "system message of the chat template, also of chats in a file of rollouts; empty: none")
    max_prompt_tokens: int = setting(512, "tokens; longer prompts are dropped by rule and listed", ge=1)
    held_out: int = setting(64, "problems kept out of training for evaluation, disjoint by text", ge=0)


@dataclass(frozen=True, config=STRICT)
class RewardConfig:
    """How a response is scored. Verifiers run in workers that can be killed."""

    name: str = setting("", "exact | math | reasoning_gym | package.module:function; empty: the one of the data source")
    options: dict[str, Any] = setting({}, "passed to the verifier")
    timeout_seconds: float = setting(10.0, "seconds for one verdict, then invalid", gt=0)
    memory_mb: int = setting(1024, "MiB of address space a worker may add, then invalid", ge=64)
    workers: int = setting(1, "verifier processes on this host", ge=1)
    max_invalid_share: float = setting(
        0.1, "share of responses without a reward above which a run stops, and an evaluation is not kept", ge=0, le=1
    )


@dataclass(frozen=True, config=STRICT)
class SamplingConfig:
    """How responses are drawn. Off-policy training needs the complete distribution: top_p = 1, top_k off."""

    temperature: float = setting(1.0, "softmax temperature, also of the loss", gt=0)
    top_p: float = setting(1.0, "nucleus mass; 1: off", gt=0, le=1)
    top_k: int = setting(0, "candidates kept; 0: off", ge=0)
    max_new_tokens: int = setting(256, "tokens of a response, the stop token included", ge=1)
    stop_token_ids: list[int] = setting([], "further token ids that end a response, besides the model's own")


@dataclass(frozen=True, config=STRICT)
class RolloutConfig:
    """The engines that generate."""

    MOVED: ClassVar = {
        name: "is gone: each rank drives one engine of its own; for more, start torchrun with --nproc-per-node N"
        for name in ("engines", "urls")
    }

    tensor_parallel: int = setting(1, "devices (CPU: processes) that an engine is split over", ge=1)
    engine_dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: the model's dtype")
    memory_share: float = setting(
        0.0, "share of a GPU the engine may use; 0: 0.85, or 0.4 in async; CPU: see kv_cache_mb", ge=0, lt=1
    )
    kv_cache_mb: int = setting(1024, "MiB of KV cache on CPU (vLLM rounds up to GiB)", ge=64)


@dataclass(frozen=True, config=STRICT)
class ObjectiveConfig:
    """The loss on log-probs; see oapl_kernels.objectives."""

    name: str = setting("oapl", "oapl | grpo | … (docs/kernels.md lists them) | package.module:factory")
    beta1: float = setting(
        1.0, "temperature of the group value, reward units; inf: the group mean", gt=0, allow_inf_nan=True
    )
    beta2: float = setting(1e-3, "weight of the log-ratio; 1e-3 for long, about 0.1 for short answers", gt=0)
    scale_free_nats: float | None = setting(None, "choose beta2 each step so that rms(A)/beta2 is this many nats", gt=0)
    equal_groups: Literal["drop", "keep", "subsample", "resample"] = setting(
        "drop",
        "groups whose rewards are all equal carry no signal about the answer; resample: other prompts take "
        "their places, so that a step is full",
    )
    overlong: Literal["as_scored", "excluded", "soft"] = setting(
        "as_scored", "responses cut at max_new_tokens; soft: linear penalty over the last fifth"
    )
    behavior: Literal["engine", "recomputed"] = setting("engine", "whose log-probs stand for π_vllm")
    entropy_coefficient: float = setting(0.0, "bonus on the entropy, nats")
    reference_coefficient: float = setting(0.0, "weight of KL to the start model", ge=0)
    options: dict[str, Any] = setting({}, "the objective's own switches (clip_low, …)")


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """How a step is computed; changes speed and memory, not the mathematics."""

    token_budget: int = setting(
        8192, "packed tokens per micro-batch; a longer group is split between its responses", ge=1
    )
    share_prompts: bool = setting(True, "compute a group's prompt once; exact")
    checkpoint_activations: bool = setting(False, "recompute activations in backward: less memory, slower")
    compile: bool = setting(False, "torch.compile the model's layers")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "matmul precision; auto: bfloat16 where device and engine compute in it, else float32"
    )
    nonfinite: Literal["stop", "skip"] = setting("stop", "what a NaN or Inf in loss or gradient does")


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW, decoupled weight decay, linear warm-up, cosine decay."""

    learning_rate: float = setting(1e-6, "peak; 1e-6 at billions, 3e-4 micro", gt=0)
    beta1: float = setting(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = setting(0.95, "decay of the second moment (paper: .95)", ge=0, lt=1)
    epsilon: float = setting(1e-10, "denominator floor (paper: 1e-10)", gt=0)
    weight_decay: float = setting(1e-8, "decoupled decay (paper: 1e-8)", ge=0)
    warmup_share: float = setting(0.02, "share of steps of linear warm-up", ge=0, le=1)
    decay_to: float = setting(0.05, "final share of the peak; 1: constant", ge=0, le=1)
    clip_norm: float = setting(1.0, "largest global gradient norm; inf: off", gt=0, allow_inf_nan=True)


@dataclass(frozen=True, config=STRICT)
class WeightsConfig:
    """Trainer to live engines."""

    MOVED: ClassVar = {"golden_prompts": "is now weights.probe_prompts"}

    transport: str = setting(
        "auto",
        "memfd | file | gloo | nccl | cuda_ipc | package.module:transport; auto: cuda_ipc where there is CUDA, else "
        "memfd; nccl and cuda_ipc need CUDA",
    )
    bucket_mb: int = setting(64, "MiB of one of the two transfer buckets", ge=1)
    probe_prompts: int = setting(4, "prompts whose log-probs attest that the new weights are used", ge=1)


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """What survives a kill."""

    every: int = setting(0, "steps between checkpoints; 0: at each publish and at the end", ge=0)
    keep: int = setting(2, "newest checkpoints kept", ge=1)


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """Held-out pass@k by the engine, before and after training and in between."""

    every: int = setting(0, "steps between evaluations (at publishes); 0: only before and after", ge=0)
    task: str = setting("", "other task of the same source; empty: the training task's held-out problems")
    n: int = setting(4, "samples per problem; 0: no evaluation", ge=0)
    k: list[int] = setting([1], "k of pass@k, each at most n")
    temperature: float = setting(1.0, "sampling temperature", gt=0)
    correct: float = setting(1.0, "reward from which a response counts as correct in pass@k")


@dataclass(frozen=True, config=STRICT)
class ReportConfig:
    """Besides metrics.jsonl, which is always written."""

    tensorboard: bool = setting(False, "also write TensorBoard events (needs the tensorboard package)")
    wandb: str = setting("", "also log to this Weights & Biases project (needs the wandb package)")


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """One run of `torchrun -m oapl_engine.train`."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Recipe from a TOML file with `--section.field value` overrides, validated. Raises ConfigError."""
    tables = apply_overrides(read_toml(path), overrides or [], Recipe)
    recipe: Recipe = build(Recipe, tables, str(path))
    if not recipe.run.dir:
        run = dataclasses.replace(recipe.run, dir=f"runs/{Path(path).stem}")
        recipe = dataclasses.replace(recipe, run=run)
    check_cross_fields(recipe)
    return recipe


def check_cross_fields(recipe: Recipe) -> None:
    """Rules that involve several fields. Raises ConfigError for the first that is broken."""
    for broken, message in _schedule_rules(recipe) + _data_rules(recipe):
        if broken:
            raise ConfigError(message)
    check_template(recipe.data.template)


def check_unread(recipe: Recipe, selector: str, unread: Iterable[str], overrides: Sequence[str] = ()) -> None:
    """Raises ConfigError for a field among `unread` ("section" or "section.field") that is set to another value than
    its default, though what `selector` names does not look at it.

    Where an override changes the selector, fields that the file wrote for the one before are passed over.
    """
    default, overridden = Recipe(), overridden_fields(overrides)
    for entry in unread:
        section, _, name = entry.partition(".")
        given, usual = getattr(recipe, section), getattr(default, section)
        for field in [name] if name else [field.name for field in dataclasses.fields(given)]:
            value = getattr(given, field)
            stale = selector in overridden and f"{section}.{field}" not in overridden
            if value != getattr(usual, field) and not stale:
                chooser, _, choice = selector.partition(".")
                named = getattr(getattr(recipe, chooser), choice)
                raise ConfigError(f'{section}.{field} = {value!r} has no effect with {selector} = "{named}": remove it')


def _schedule_rules(r: Recipe) -> list[tuple[bool, str]]:
    """(whether it is broken, what is said then) of rules on [schedule], and on [objective] as the schedule uses it."""
    s, generates = r.schedule, r.schedule.traits.generates
    return [
        (
            s.traits.every_step and s.lag != 1,
            f'schedule.mode = "{s.mode}" means schedule.lag = 1, not {s.lag}: set lag = 1 or mode = "phased"',
        ),
        (
            0 < s.max_groups_ahead < s.groups_per_step,
            f"schedule.max_groups_ahead = {s.max_groups_ahead} is below schedule.groups_per_step = "
            f"{s.groups_per_step}: a step could never be filled; raise it, or 0 for lag x groups_per_step",
        ),
        (
            generates and s.window > 1 and not s.keeps_window,
            f'schedule.window = {s.window}: mode = "{s.mode}" clears at each publish; use mode = "async", or "phased" '
            'with on_publish = "keep"',
        ),
        (
            not generates and r.objective.equal_groups == "resample",
            'objective.equal_groups = "resample" needs an engine; in offline mode use "drop"',
        ),
        (
            s.group_size < 2,
            f"schedule.group_size = {s.group_size}: a group baseline needs 2 rollouts per prompt or more",
        ),
        (
            r.objective.behavior == "recomputed" and s.traits.overlaps,
            'objective.behavior = "recomputed" in async mode: π has moved on by then; use "engine", or mode = "phased"',
        ),
    ]


def _data_rules(r: Recipe) -> list[tuple[bool, str]]:
    """The same of rules on the sections that say what is sampled, trained and evaluated."""
    sampling, n, generates = r.sampling, r.evaluation.n, r.schedule.traits.generates
    truncated = sampling.top_p < 1 or sampling.top_k > 0
    return [
        (
            truncated and r.objective.behavior == "engine" and generates,
            f"sampling.top_p = {sampling.top_p}, top_k = {sampling.top_k}: samples come from the nucleus and their "
            'log-probs do not agree with the loss; set top_p = 1 and top_k = 0, or objective.behavior = "recomputed" '
            "(biased)",
        ),
        (not r.model.path, "model.path is empty: name a folder in Hugging Face layout, or a hub name"),
        (
            n > 0 and not r.data.held_out and generates,
            "data.held_out = 0 leaves nothing to evaluate: raise it, or set evaluation.n = 0",
        ),
        (
            r.train.precision == "bfloat16" and _is_exactly_served(r),
            'train.precision = "bfloat16" with an engine in float32: updates below bfloat16\'s spacing would reach the '
            'engine and not the trainer; set rollout.engine_dtype = "bfloat16", or precision = "float32"',
        ),
    ] + [
        (n > 0 and not 1 <= k <= n, f"evaluation.k = {k}: pass@k needs 1 <= k <= evaluation.n = {n}")
        for k in r.evaluation.k
    ]


def check_template(template: str) -> None:
    """Raises ConfigError where a template has no place for the question."""
    if template not in ("chat", "raw") and "{question}" not in template:
        raise ConfigError('data.template has no {question}: write "chat", "raw", or a text with {question} in it')


def resolve_engine_dtype(r: Recipe) -> str:
    """What the engine computes in."""
    return r.model.dtype if r.rollout.engine_dtype == "auto" else r.rollout.engine_dtype


def _is_exactly_served(r: Recipe) -> bool:
    """An engine sees float32 weights as they are: products of theirs rounded to bfloat16 are those of another policy,
    because an update below bfloat16's spacing reaches the one and not the other."""
    return r.model.dtype == resolve_engine_dtype(r) == "float32" and r.schedule.traits.generates


def resolve_train_config(r: Recipe) -> TrainConfig:
    """[train] with precision "auto" resolved where the engine decides it."""
    if r.train.precision == "auto" and _is_exactly_served(r):
        return dataclasses.replace(r.train, precision="float32")
    return r.train
