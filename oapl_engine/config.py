"""The recipe: frozen dataclasses, one a TOML section, every rule about a field beside it.

`load_recipe(path, overrides)` reads TOML, lays `--section.field value` over it and validates. What is wrong raises
`ConfigError` (exit code 2): the field, its value, what is allowed, the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True)


class ConfigError(ValueError):
    """Bad input in a recipe or on the command line: exit code 2."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that its message explains: told in one line, exit code 1."""


@dataclass(frozen=True, config=STRICT)
class Run:
    """Where a run lives and what makes it repeatable."""

    dir: str = Field(
        default="", description='run directory; the same command again resumes it. Empty: "runs/" + recipe name'
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of data order, sampling and initial state")
    threads: int = Field(
        default=0, ge=0, description="torch threads of the trainer; 0: every core this process may use"
    )


@dataclass(frozen=True, config=STRICT)
class Model:
    """The policy: any transformers causal LM."""

    path: str = Field(default="", description="folder in Hugging Face layout, or hub name; required")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of the master weights; float32 keeps small updates from rounding away"
    )
    attention: Literal["auto", "sdpa", "flash"] = Field(
        default="auto",
        description="packed attention; auto: flash-attn or torch varlen on CUDA, SDPA per segment on CPU",
    )
    lora_rank: int = Field(
        default=0, ge=0, description="rank of LoRA adapters on all linear layers; 0: full fine-tuning"
    )


@dataclass(frozen=True, config=STRICT)
class Data:
    """Where prompts come from. In offline mode: the file of rollouts to train on."""

    source: Literal["micro", "reasoning_gym", "jsonl", "parquet", "hf", "benchmark"] = Field(
        default="reasoning_gym",
        description="micro: generated sort / addition; benchmark: aime25, math500, …, from the hub or data.path; "
        "parquet and jsonl hold rollouts in offline mode",
    )
    task: str = Field(
        default="", description="task name within the source (reasoning-gym data set, micro task, hub data set)"
    )
    path: str = Field(default="", description="file for jsonl, parquet and (optional) benchmark")
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the task (size, difficulty, …)")
    template: str = Field(
        default="chat",
        description='"chat": the tokenizer\'s chat template; "raw": the question; else text with {question}',
    )
    system: str = Field(default="", description="system message of the chat template; empty: none")
    max_prompt_tokens: int = Field(
        default=512, ge=1, description="tokens; longer prompts are dropped by rule and listed"
    )
    held_out: int = Field(
        default=64, ge=0, description="problems kept out of training for evaluation, disjoint by text"
    )


@dataclass(frozen=True, config=STRICT)
class Reward:
    """How a response is scored. Verifiers run in workers that can be killed."""

    name: str = Field(default="", description="exact | math | reasoning_gym | code; empty: the one of the data source")
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the verifier")
    timeout_seconds: float = Field(
        default=10.0, gt=0, allow_inf_nan=False, description="seconds for one verdict, then invalid"
    )
    memory_mb: int = Field(default=1024, ge=64, description="MiB of address space a worker may add, then invalid")
    workers: int = Field(default=1, ge=1, description="verifier processes on this host")


@dataclass(frozen=True, config=STRICT)
class Sampling:
    """How responses are drawn. Off-policy training wants the whole distribution: top_p = 1, top_k off."""

    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="softmax temperature, also of the loss"
    )
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False, description="nucleus mass; 1: off")
    top_k: int = Field(default=0, ge=0, description="candidates kept; 0: off")
    max_new_tokens: int = Field(default=256, ge=1, description="tokens of a response, the stop token included")
    stop_token_ids: list[int] = Field(default_factory=list, description="token ids that end a response; empty: eos")


@dataclass(frozen=True, config=STRICT)
class RolloutSection:
    """The engines that generate."""

    engines: int = Field(default=1, ge=1, description="vLLM engines owned by this run")
    tensor_parallel: int = Field(default=1, ge=1, description="devices (CPU: processes) an engine is split over")
    engine_dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto: the model's dtype")
    memory_share: float = Field(
        default=0.85,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="share of a GPU the engine may use; CPU: see kv_cache_mb",
    )
    kv_cache_mb: int = Field(default=1024, ge=64, description="MiB of KV cache on CPU (vLLM rounds up to GiB)")
    urls: list[str] = Field(default_factory=list, description="engines that run already and are not owned by this run")


@dataclass(frozen=True, config=STRICT)
class Schedule:
    """Algorithm 1: when to generate, train and publish."""

    mode: Literal["sync", "phased", "async", "offline"] = Field(
        default="phased", description="phased alternates on one device; async overlaps; offline reads finished rollouts"
    )
    steps: int = Field(default=100, ge=1, description="optimizer steps of the whole run")
    groups_per_step: int = Field(default=8, ge=1, description="groups (prompts) in an optimizer step")
    group_size: int = Field(default=8, ge=1, description="G, rollouts a prompt; 2 or more for a group baseline")
    lag: int = Field(default=16, ge=1, description="L, optimizer steps between publishes; sync means 1")
    max_kl: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="publish early past this KL, nats a token"
    )
    on_publish: Literal["drain", "abort", "keep"] = Field(
        default="drain",
        description="groups in flight at a publish are waited for, ended, or kept (they go on under the new version); "
        "phased with abort or keep: those of a credit over lag x groups_per_step, so that none waits for the slowest",
    )
    window: int = Field(default=0, ge=0, description="policy versions kept for training; 0: 1, or 2 in async and keep")
    credit: int = Field(
        default=0, ge=0, description="groups generated ahead of training at most; 0: lag x groups_per_step"
    )
    allowance: int = Field(
        default=1, ge=1, description="optimizer steps that may use one rollout (epochs in offline mode)"
    )


@dataclass(frozen=True, config=STRICT)
class ObjectiveSection:
    """The loss on log-probs; see oapl_kernels.objectives."""

    name: str = Field(default="oapl", description="oapl | grpo | … (oapl_kernels.objectives.names())")
    beta1: float = Field(
        default=1.0, gt=0, description="temperature of the group value, reward units; inf: the group mean"
    )
    beta2: float = Field(
        default=1e-3,
        gt=0,
        allow_inf_nan=False,
        description="weight of the log-ratio; 1e-3 for long, about 0.1 for short answers",
    )
    scale_free_nats: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="choose beta2 each step so that rms(A)/beta2 is this many nats",
    )
    equal_groups: Literal["drop", "keep", "subsample", "resample"] = Field(
        default="drop",
        description="groups whose rewards are all equal carry no signal about the answer; resample: other prompts take "
        "their places, so that a step is full",
    )
    overlong: Literal["as_scored", "excluded", "soft"] = Field(
        default="as_scored", description="responses cut at max_new_tokens; soft: linear penalty over the last fifth"
    )
    behavior: Literal["engine", "recomputed"] = Field(default="engine", description="whose log-probs stand for π_vllm")
    entropy_coefficient: float = Field(default=0.0, allow_inf_nan=False, description="bonus on the entropy, nats")
    reference_coefficient: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="weight of KL to the start model"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="the objective's own switches (clip_low, …)")


@dataclass(frozen=True, config=STRICT)
class Train:
    """How a step is computed; changes speed and memory, not the mathematics."""

    token_budget: int = Field(
        default=8192, ge=1, description="packed tokens a micro-batch; a longer group is split between its responses"
    )
    share_prompts: bool = Field(default=True, description="compute a group's prompt once; exact")
    checkpoint_activations: bool = Field(
        default=False, description="recompute activations in backward: less memory, slower"
    )
    compile: bool = Field(default=False, description="torch.compile the model's layers")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="matmul precision; auto: bfloat16 where the device has it in hardware, else float32"
    )
    nonfinite: Literal["stop", "skip"] = Field(default="stop", description="what a NaN or Inf in loss or gradient does")


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """AdamW, decoupled weight decay, linear warm-up, cosine decay."""

    learning_rate: float = Field(
        default=1e-6, gt=0, allow_inf_nan=False, description="peak; 1e-6 at billions, 3e-4 micro"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, allow_inf_nan=False, description="decay of the first moment")
    beta2: float = Field(
        default=0.95, ge=0, lt=1, allow_inf_nan=False, description="decay of the second moment (paper: .95)"
    )
    epsilon: float = Field(default=1e-10, gt=0, allow_inf_nan=False, description="denominator floor (paper: 1e-10)")
    weight_decay: float = Field(default=1e-8, ge=0, allow_inf_nan=False, description="decoupled decay (paper: 1e-8)")
    warmup_share: float = Field(
        default=0.02, ge=0, le=1, allow_inf_nan=False, description="share of steps of linear warm-up"
    )
    decay_to: float = Field(
        default=0.05, ge=0, le=1, allow_inf_nan=False, description="final share of the peak; 1: constant"
    )
    clip_norm: float = Field(default=1.0, gt=0, description="largest global gradient norm; inf: off")


@dataclass(frozen=True, config=STRICT)
class Weights:
    """Trainer to live engines."""

    transport: Literal["auto", "memfd", "file", "gloo", "nccl", "cuda_ipc"] = Field(
        default="auto", description="auto: cuda_ipc where there is CUDA, else memfd; nccl and cuda_ipc need CUDA"
    )
    bucket_mb: int = Field(default=64, ge=1, description="MiB of one of the two transfer buckets")
    golden_prompts: int = Field(
        default=4, ge=1, description="prompts whose log-probs attest that the new weights are used"
    )


@dataclass(frozen=True, config=STRICT)
class CheckpointSection:
    """What survives a kill."""

    every: int = Field(default=0, ge=0, description="steps between checkpoints; 0: at each publish and at the end")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept")


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """Held-out pass@k by the engine, before and after training and in between."""

    every: int = Field(
        default=0, ge=0, description="steps between evaluations (at publishes); 0: only before and after"
    )
    task: str = Field(
        default="", description="other task of the same source; empty: the training task's held-out problems"
    )
    n: int = Field(default=4, ge=0, description="samples a problem; 0: no evaluation")
    k: list[int] = Field(default_factory=lambda: [1], description="k of pass@k, each at most n")
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="sampling temperature")


@dataclass(frozen=True, config=STRICT)
class Report:
    """Besides metrics.jsonl, which is always written."""

    tensorboard: bool = Field(
        default=False, description="also write TensorBoard events (needs the tensorboard package)"
    )
    wandb: str = Field(default="", description="also log to this Weights & Biases project (needs the wandb package)")


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """One run of `torchrun -m oapl_engine.train`."""

    run: Run = dataclasses.field(default_factory=Run)
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    reward: Reward = dataclasses.field(default_factory=Reward)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    rollout: RolloutSection = dataclasses.field(default_factory=RolloutSection)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    objective: ObjectiveSection = dataclasses.field(default_factory=ObjectiveSection)
    train: Train = dataclasses.field(default_factory=Train)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    weights: Weights = dataclasses.field(default_factory=Weights)
    checkpoint: CheckpointSection = dataclasses.field(default_factory=CheckpointSection)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    report: Report = dataclasses.field(default_factory=Report)


@dataclass(frozen=True, config=STRICT)
class MicroModel:
    """The Llama that `oapl sft` makes from nothing."""

    out: str = Field(default="", description="folder to write (Hugging Face layout); required")
    hidden: int = Field(default=64, ge=32, description="hidden size")
    layers: int = Field(default=3, ge=1, description="decoder layers")
    heads: int = Field(default=2, ge=1, description="attention heads; vLLM's CPU attention wants head sizes from 32")


@dataclass(frozen=True, config=STRICT)
class SftTrain:
    """Supervised warm start."""

    steps: int = Field(default=100, ge=1, description="optimizer steps")
    batch_size: int = Field(default=64, ge=1, description="examples a step")
    learning_rate: float = Field(default=3e-3, gt=0, allow_inf_nan=False, description="peak, linear decay to zero")


@dataclass(frozen=True, config=STRICT)
class SftRecipe:
    """One `oapl sft`: a micro model warmed up on generated examples."""

    run: Run = dataclasses.field(default_factory=Run)
    model: MicroModel = dataclasses.field(default_factory=MicroModel)
    data: Data = dataclasses.field(default_factory=lambda: Data(source="micro", task="sort"))
    train: SftTrain = dataclasses.field(default_factory=SftTrain)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Recipe from a TOML file with `--section.field value` overrides, validated. Raises ConfigError."""
    tables = apply_overrides(read_toml(path), overrides or [], Recipe)
    recipe: Recipe = build(Recipe, tables, str(path))
    if not recipe.run.dir:
        run = dataclasses.replace(recipe.run, dir=f"runs/{Path(path).stem}")
        recipe = dataclasses.replace(recipe, run=run)
    check_together(recipe)
    return recipe


def load_sft_recipe(path: str | Path, overrides: list[str] | None = None) -> SftRecipe:
    """SftRecipe from a TOML file, validated. Raises ConfigError."""
    tables = apply_overrides(read_toml(path), overrides or [], SftRecipe)
    tables.setdefault("data", {}).setdefault("source", "micro")
    recipe: SftRecipe = build(SftRecipe, tables, str(path))
    if not recipe.model.out:
        raise ConfigError("model.out is empty: name the folder that the model is written to, e.g. models/micro")
    if recipe.data.source != "micro":
        raise ConfigError(f'data.source = "{recipe.data.source}": oapl sft generates its own examples, use "micro"')
    if recipe.model.hidden % recipe.model.heads:
        raise ConfigError(f"model.hidden = {recipe.model.hidden} is no multiple of model.heads = {recipe.model.heads}")
    return recipe


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parsed TOML. Raises ConfigError that names the file and what is wrong with it."""
    path = Path(path)
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"recipe {path} does not exist{hint}")
    if path.is_dir():
        raise ConfigError(f"recipe {path} is a directory: name a TOML file")
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error
    except PermissionError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from error


def apply_overrides(tables: dict[str, Any], overrides: list[str], schema: type) -> dict[str, Any]:
    """Tables with `--section.field value` pairs (or `--section.field=value`) laid over; values are TOML, or text."""
    tables = {k: dict(v) if isinstance(v, dict) else v for k, v in tables.items()}
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or "." not in word:
            raise ConfigError(f"argument {word}: overrides are written --section.field value")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"override --{name} has no value: write --{name} VALUE")
            text = words.pop(0)
        _set_field(tables, name, text, schema)
    return tables


def _set_field(tables: dict[str, Any], name: str, text: str, schema: type) -> None:
    section, *path = name.split(".")
    sections = _sections(schema)
    if section not in sections:
        raise ConfigError(f"override --{name}: {_unknown('section', section, list(sections))}")
    fields = [f.name for f in dataclasses.fields(sections[section])]
    if path[0] not in fields:
        raise ConfigError(f"override --{name}: {_unknown('field', path[0], fields, section)}")
    table = tables.setdefault(section, {})
    for key in path[:-1]:
        table = table.setdefault(key, {})
    table[path[-1]] = _toml_value(text)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _sections(schema: type) -> dict[str, type]:
    return {f.name: _section_type(schema, f.name) for f in dataclasses.fields(schema)}


def _section_type(schema: type, name: str) -> type:
    kind = schema.__pydantic_fields__[name].annotation  # type: ignore[attr-defined]
    return kind if isinstance(kind, type) else type(kind)


def _unknown(what: str, name: str, valid: list[str], section: str = "") -> str:
    near = difflib.get_close_matches(name, valid, 1, 0.5)
    where = f" in [{section}]" if section else ""
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(valid))}"
    return f"unknown {what} {name}{where}; {hint}"


def build(schema: type, tables: dict[str, Any], origin: str) -> Any:
    """A validated instance of `schema` from TOML tables. Raises ConfigError that names section, field, value, limit."""
    sections = _sections(schema)
    parts = {}
    for section, table in tables.items():
        if section not in sections:
            raise ConfigError(f"{origin}: {_unknown('section', section, list(sections))}")
        if not isinstance(table, dict):
            raise ConfigError(
                f"{origin}: {section} = {table!r} must be a table: write [{section}] and its fields below"
            )
        try:
            parts[section] = sections[section](**table)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{origin}: {_explain(section, sections[section], error)}") from error
    return schema(**parts)


def _explain(section: str, kind: type, error: pydantic.ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        name = str(item["loc"][0])
        if item["type"] == "unexpected_keyword_argument":
            lines.append(_unknown("field", name, [f.name for f in dataclasses.fields(kind)], section))
            continue
        doc = kind.__pydantic_fields__[name].description  # type: ignore[attr-defined]
        lines.append(f"{section}.{name} = {item['input']!r}: {item['msg'].lower()} ({doc})")
    return "; ".join(lines)


def check_together(recipe: Recipe) -> None:
    """Rules that involve several fields. Raises ConfigError."""
    for rule in (_check_schedule, _check_objective, _check_sampling, _check_data, _check_evaluation, _check_built):
        rule(recipe)


def _check_schedule(r: Recipe) -> None:
    s = r.schedule
    if s.mode == "sync" and s.lag != 1:
        raise ConfigError(f'schedule.mode = "sync" means schedule.lag = 1, not {s.lag}: set lag = 1 or mode = "phased"')
    if s.mode == "offline" and r.rollout.urls:
        raise ConfigError('schedule.mode = "offline" uses no engine: remove rollout.urls')
    if s.credit and s.credit < s.groups_per_step:
        raise ConfigError(
            f"schedule.credit = {s.credit} is below schedule.groups_per_step = {s.groups_per_step}: a step could never "
            "be filled; raise it, or 0 for lag x groups_per_step"
        )
    carries = s.mode == "async" or (s.mode == "phased" and s.on_publish == "keep")
    if s.mode != "offline" and s.window > 1 and not carries:
        raise ConfigError(
            f'schedule.window = {s.window}: mode = "{s.mode}" clears at each publish; use mode = "async", or "phased" '
            'with on_publish = "keep"'
        )
    if s.mode == "offline" and r.objective.equal_groups == "resample":
        raise ConfigError('objective.equal_groups = "resample" needs an engine; in offline mode use "drop"')


def _check_objective(r: Recipe) -> None:
    o, s = r.objective, r.schedule
    if math.isnan(o.beta1):
        raise ConfigError("objective.beta1 = nan: a positive number, or inf for the group mean")
    if s.group_size < 2:
        raise ConfigError(f"schedule.group_size = {s.group_size}: a group baseline needs 2 rollouts a prompt or more")
    if o.behavior == "recomputed" and s.mode == "async":
        raise ConfigError(
            'objective.behavior = "recomputed" in async mode: π has moved on by then; use "engine", or mode = "phased"'
        )
    if math.isnan(r.optimizer.clip_norm):
        raise ConfigError("optimizer.clip_norm = nan: a positive number, or inf for no clipping")


def _check_sampling(r: Recipe) -> None:
    s = r.sampling
    if (s.top_p < 1 or s.top_k > 0) and r.objective.behavior == "engine" and r.schedule.mode != "offline":
        raise ConfigError(
            f"sampling.top_p = {s.top_p}, top_k = {s.top_k}: samples come from the nucleus and their log-probs do not "
            'agree with the loss; set top_p = 1 and top_k = 0, or objective.behavior = "recomputed" (biased)'
        )


def _check_data(r: Recipe) -> None:
    d = r.data
    if not r.model.path:
        raise ConfigError("model.path is empty: name a folder in Hugging Face layout, or a hub name")
    if d.source in ("jsonl", "parquet") and not d.path:
        raise ConfigError(f'data.path is empty: data.source = "{d.source}" reads a file')
    if d.source in ("micro", "reasoning_gym", "hf", "benchmark") and not d.task:
        raise ConfigError(f'data.task is empty: data.source = "{d.source}" needs the name of a task')
    if r.schedule.mode == "offline" and d.source not in ("jsonl", "parquet"):
        raise ConfigError(f'data.source = "{d.source}": mode = "offline" reads rollouts from "jsonl" or "parquet"')
    if d.source == "parquet" and r.schedule.mode != "offline":
        raise ConfigError('data.source = "parquet" holds finished rollouts: use schedule.mode = "offline"')
    if d.template not in ("chat", "raw") and "{question}" not in d.template:
        raise ConfigError('data.template has no {question}: write "chat", "raw", or a text with {question} in it')


def _check_evaluation(r: Recipe) -> None:
    if r.evaluation.n and not r.data.held_out and r.schedule.mode != "offline":
        raise ConfigError("data.held_out = 0 leaves nothing to evaluate: raise it, or set evaluation.n = 0")
    for k in r.evaluation.k if r.evaluation.n else ():
        if not 1 <= k <= r.evaluation.n:
            raise ConfigError(f"evaluation.k = {k}: pass@k needs 1 <= k <= evaluation.n = {r.evaluation.n}")


def _check_built(r: Recipe) -> None:
    """What the contract has a field for and this version cannot do is refused, never ignored."""
    if r.rollout.engines > 1 or r.rollout.urls:
        raise ConfigError(
            f"rollout.engines = {r.rollout.engines}, rollout.urls = {r.rollout.urls}: this version drives one engine "
            "of its own a rank; set engines = 1 and urls = [], and for more start torchrun with --nproc-per-node N"
        )


def to_toml(recipe: Recipe | SftRecipe) -> dict[str, Any]:
    """Plain tables of a recipe, None left out: what config.toml of a run directory holds."""
    tables = dataclasses.asdict(recipe)
    return {s: {k: v for k, v in t.items() if v is not None} for s, t in tables.items()}


def describe(schema: type) -> list[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """[(section, why it exists, [(field, type, default, unit and reason)])] of a recipe class, in order."""
    return [(name, (kind.__doc__ or "").strip(), _fields(kind)) for name, kind in _sections(schema).items()]


def _fields(kind: type) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, info in kind.__pydantic_fields__.items():  # type: ignore[attr-defined]
        default = info.get_default(call_default_factory=True)
        rows.append((name, _type_name(info.annotation), _shown(default), info.description))
    return rows


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(f'"{choice}"' for choice in get_args(annotation))
    if isinstance(annotation, type) and not get_args(annotation):
        return {"str": "text", "bool": "true | false"}.get(annotation.__name__, annotation.__name__)
    return str(annotation).replace("typing.", "").replace("str", "text").replace(" | None", "")


def _shown(value: Any) -> str:
    if value is None:
        return "off"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else json.dumps(value)
