"""The recipe: frozen dataclasses, one a TOML section, every rule about a field beside it.

`load_recipe(path, overrides)` reads TOML, lays `--section.field value` over it and validates. What is wrong raises
`ConfigError` (exit code 2): the field, its value, what is allowed, the nearest valid name.
"""

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def setting(default: Any, why: str, **limits: Any) -> Any:
    """A field of a section: its default, its unit and reason in one line, pydantic's limits (ge, lt, …)."""
    return Field(default=default, description=why, **limits)


class ConfigError(ValueError):
    """Bad input in a recipe or on the command line: exit code 2."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that its message explains: told in one line, exit code 1."""


@dataclass(frozen=True, config=STRICT)
class Run:
    """Where a run lives and what makes it repeatable."""

    dir: str = setting("", 'run directory; the same command again resumes it. Empty: "runs/" + recipe name')
    seed: int = setting(0, "seed of data order, sampling and initial state", ge=0, lt=2**31)
    threads: int = setting(0, "torch threads of the trainer; 0: every core this process may use", ge=0)


@dataclass(frozen=True, config=STRICT)
class Model:
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
class Data:
    """Where prompts come from. In offline mode: the file of rollouts to train on."""

    source: Literal["micro", "reasoning_gym", "jsonl", "parquet", "hf", "benchmark"] = setting(
        "reasoning_gym",
        "micro: generated sort / addition; benchmark: aime25, math500, …, from the hub or data.path; "
        "parquet and jsonl hold rollouts in offline mode",
    )
    task: str = setting("", "task name within the source (reasoning-gym data set, micro task, hub data set)")
    path: str = setting("", "file for jsonl, parquet and (optional) benchmark")
    options: dict[str, Any] = setting({}, "passed to the task (size, difficulty, …)")
    template: str = setting(
        "chat", '"chat": the tokenizer\'s chat template; "raw": the question; else text with {question}'
    )
    system: str = setting("", "system message of the chat template; empty: none")
    max_prompt_tokens: int = setting(512, "tokens; longer prompts are dropped by rule and listed", ge=1)
    held_out: int = setting(64, "problems kept out of training for evaluation, disjoint by text", ge=0)


@dataclass(frozen=True, config=STRICT)
class Reward:
    """How a response is scored. Verifiers run in workers that can be killed."""

    name: str = setting("", "exact | math | reasoning_gym | package.module:function; empty: the one of the data source")
    options: dict[str, Any] = setting({}, "passed to the verifier")
    timeout_seconds: float = setting(10.0, "seconds for one verdict, then invalid", gt=0)
    memory_mb: int = setting(1024, "MiB of address space a worker may add, then invalid", ge=64)
    workers: int = setting(1, "verifier processes on this host", ge=1)


@dataclass(frozen=True, config=STRICT)
class Sampling:
    """How responses are drawn. Off-policy training wants the whole distribution: top_p = 1, top_k off."""

    temperature: float = setting(1.0, "softmax temperature, also of the loss", gt=0)
    top_p: float = setting(1.0, "nucleus mass; 1: off", gt=0, le=1)
    top_k: int = setting(0, "candidates kept; 0: off", ge=0)
    max_new_tokens: int = setting(256, "tokens of a response, the stop token included", ge=1)
    stop_token_ids: list[int] = setting([], "token ids that end a response; empty: eos")


@dataclass(frozen=True, config=STRICT)
class RolloutSection:
    """The engines that generate."""

    engines: int = setting(1, "vLLM engines owned by this run", ge=1)
    tensor_parallel: int = setting(1, "devices (CPU: processes) an engine is split over", ge=1)
    engine_dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: the model's dtype")
    memory_share: float = setting(0.85, "share of a GPU the engine may use; CPU: see kv_cache_mb", gt=0, lt=1)
    kv_cache_mb: int = setting(1024, "MiB of KV cache on CPU (vLLM rounds up to GiB)", ge=64)
    urls: list[str] = setting([], "engines that run already and are not owned by this run")


@dataclass(frozen=True, config=STRICT)
class Schedule:
    """Algorithm 1: when to generate, train and publish."""

    mode: Literal["sync", "phased", "async", "offline"] = setting(
        "phased", "phased alternates on one device; async overlaps; offline reads finished rollouts"
    )
    steps: int = setting(100, "optimizer steps of the whole run", ge=1)
    groups_per_step: int = setting(8, "groups (prompts) in an optimizer step", ge=1)
    group_size: int = setting(8, "G, rollouts a prompt; 2 or more for a group baseline", ge=1)
    lag: int = setting(16, "L, optimizer steps between publishes; sync means 1", ge=1)
    max_kl: float | None = setting(None, "publish early past this KL, nats a token", gt=0)
    on_publish: Literal["drain", "abort", "keep"] = setting(
        "drain",
        "groups in flight at a publish are waited for, ended, or kept (they go on under the new version); "
        "phased with abort or keep: those of a credit over lag x groups_per_step, so that none waits for the slowest",
    )
    window: int = setting(0, "policy versions kept for training; 0: 1, or 2 in async and keep", ge=0)
    credit: int = setting(0, "groups generated ahead of training at most; 0: lag x groups_per_step", ge=0)
    allowance: int = setting(1, "optimizer steps that may use one rollout (epochs in offline mode)", ge=1)


@dataclass(frozen=True, config=STRICT)
class ObjectiveSection:
    """The loss on log-probs; see oapl_kernels.objectives."""

    name: str = setting("oapl", "oapl | grpo | … (oapl_kernels.objectives.names())")
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
class Train:
    """How a step is computed; changes speed and memory, not the mathematics."""

    token_budget: int = setting(
        8192, "packed tokens a micro-batch; a longer group is split between its responses", ge=1
    )
    share_prompts: bool = setting(True, "compute a group's prompt once; exact")
    checkpoint_activations: bool = setting(False, "recompute activations in backward: less memory, slower")
    compile: bool = setting(False, "torch.compile the model's layers")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "matmul precision; auto: bfloat16 where device and engine compute in it, else float32"
    )
    nonfinite: Literal["stop", "skip"] = setting("stop", "what a NaN or Inf in loss or gradient does")


@dataclass(frozen=True, config=STRICT)
class Optimizer:
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
class Weights:
    """Trainer to live engines."""

    transport: Literal["auto", "memfd", "file", "gloo", "nccl", "cuda_ipc"] = setting(
        "auto", "auto: cuda_ipc where there is CUDA, else memfd; nccl and cuda_ipc need CUDA"
    )
    bucket_mb: int = setting(64, "MiB of one of the two transfer buckets", ge=1)
    golden_prompts: int = setting(4, "prompts whose log-probs attest that the new weights are used", ge=1)


@dataclass(frozen=True, config=STRICT)
class CheckpointSection:
    """What survives a kill."""

    every: int = setting(0, "steps between checkpoints; 0: at each publish and at the end", ge=0)
    keep: int = setting(2, "newest checkpoints kept", ge=1)


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """Held-out pass@k by the engine, before and after training and in between."""

    every: int = setting(0, "steps between evaluations (at publishes); 0: only before and after", ge=0)
    task: str = setting("", "other task of the same source; empty: the training task's held-out problems")
    n: int = setting(4, "samples a problem; 0: no evaluation", ge=0)
    k: list[int] = setting([1], "k of pass@k, each at most n")
    temperature: float = setting(1.0, "sampling temperature", gt=0)


@dataclass(frozen=True, config=STRICT)
class Report:
    """Besides metrics.jsonl, which is always written."""

    tensorboard: bool = setting(False, "also write TensorBoard events (needs the tensorboard package)")
    wandb: str = setting("", "also log to this Weights & Biases project (needs the wandb package)")


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """One run of `torchrun -m oapl_engine.train`."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    reward: Reward = Reward()
    sampling: Sampling = Sampling()
    rollout: RolloutSection = RolloutSection()
    schedule: Schedule = Schedule()
    objective: ObjectiveSection = ObjectiveSection()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    weights: Weights = Weights()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: Evaluation = Evaluation()
    report: Report = Report()


@dataclass(frozen=True, config=STRICT)
class MicroModel:
    """The Llama that `oapl sft` makes from nothing."""

    out: str = setting("", "folder to write (Hugging Face layout); required")
    hidden: int = setting(64, "hidden size", ge=32)
    layers: int = setting(3, "decoder layers", ge=1)
    heads: int = setting(2, "attention heads; vLLM's CPU attention wants head sizes from 32", ge=1)


@dataclass(frozen=True, config=STRICT)
class SftTrain:
    """Supervised warm start."""

    steps: int = setting(100, "optimizer steps", ge=1)
    batch_size: int = setting(64, "examples a step", ge=1)
    learning_rate: float = setting(3e-3, "peak, linear decay to zero", gt=0)


@dataclass(frozen=True, config=STRICT)
class SftRecipe:
    """One `oapl sft`: a micro model warmed up on generated examples."""

    run: Run = Run()
    model: MicroModel = MicroModel()
    data: Data = Data(source="micro", task="sort")
    train: SftTrain = SftTrain()


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
        raise ConfigError(f"override --{name}: unknown section {section}; {nearest(section, sections)}")
    if path[0] not in sections[section].__pydantic_fields__:
        raise ConfigError(f"override --{name}: {_unknown_field(path[0], section, sections[section])}")
    table = tables.setdefault(section, {})
    for key in path[:-1]:
        table = table.setdefault(key, {})
    table[path[-1]] = _toml_value(text)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _sections(schema: type) -> dict[str, Any]:
    return {f.name: f.type for f in dataclasses.fields(schema)}


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean …?`, or the whole list where nothing is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(valid)}"


def build(schema: type, tables: dict[str, Any], origin: str) -> Any:
    """A validated instance of `schema` from TOML tables. Raises ConfigError that names section, field, value, limit."""
    sections = _sections(schema)
    parts = {}
    for section, table in tables.items():
        if section not in sections:
            raise ConfigError(f"{origin}: unknown section {section}; {nearest(section, sections)}")
        if not isinstance(table, dict):
            raise ConfigError(
                f"{origin}: {section} = {table!r} must be a table: write [{section}] and its fields below"
            )
        try:
            parts[section] = sections[section](**table)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{origin}: {_explain(section, sections[section], error)}") from error
    return schema(**parts)


def _explain(section: str, kind: Any, error: pydantic.ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        name = str(item["loc"][0])
        if item["type"] == "unexpected_keyword_argument":
            lines.append(_unknown_field(name, section, kind))
        else:
            why = kind.__pydantic_fields__[name].description
            lines.append(f"{section}.{name} = {item['input']!r}: {item['msg'].lower()} ({why})")
    return "; ".join(lines)


def _unknown_field(name: str, section: str, kind: Any) -> str:
    return f"unknown field {name} in [{section}]; {nearest(name, kind.__pydantic_fields__)}"


def check_together(recipe: Recipe) -> None:
    """Rules that involve several fields. Raises ConfigError."""
    rules = (_check_schedule, _check_objective, _check_sampling, _check_data, _check_evaluation, _check_precision)
    for rule in (*rules, _check_built):
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


def served_dtype(r: Recipe) -> str:
    """What the engine computes in."""
    return r.model.dtype if r.rollout.engine_dtype == "auto" else r.rollout.engine_dtype


def _is_exactly_served(r: Recipe) -> bool:
    """An engine sees float32 weights as they are: products of theirs rounded to bfloat16 are those of another policy,
    because an update below bfloat16's spacing reaches the one and not the other."""
    return r.model.dtype == served_dtype(r) == "float32" and r.schedule.mode != "offline"


def settled_train(r: Recipe) -> Train:
    """[train] with precision "auto" settled where the engine decides it."""
    if r.train.precision == "auto" and _is_exactly_served(r):
        return dataclasses.replace(r.train, precision="float32")
    return r.train


def _check_precision(r: Recipe) -> None:
    if r.train.precision == "bfloat16" and _is_exactly_served(r):
        raise ConfigError(
            'train.precision = "bfloat16" with an engine in float32: updates below bfloat16\'s spacing would reach the '
            'engine and not the trainer; set rollout.engine_dtype = "bfloat16", or precision = "float32"'
        )


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
    return [(name, kind.__doc__.strip(), _fields(kind)) for name, kind in _sections(schema).items()]


def _fields(kind: Any) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, info in kind.__pydantic_fields__.items():
        default = "off" if info.default is None else json.dumps(info.default)
        rows.append((name, _type_name(info.annotation), default, info.description))
    return rows


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(f'"{choice}"' for choice in get_args(annotation))
    name = annotation.__name__ if type(annotation) is type else str(annotation).replace("typing.", "")
    return name.replace("str", "text").replace("bool", "true | false").replace(" | None", "")
