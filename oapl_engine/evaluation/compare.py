"""`oapl eval`: pass@k of models and runs on the same problems, each served by an engine of its own.

The counts of every problem are kept in OUT/LABEL/eval_problems.jsonl as they come; the same command resumes from there.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oapl_engine.config import DataConfig, Recipe, RewardConfig, SamplingConfig, check_unread
from oapl_engine.config_file import apply_overrides, build, overridden_fields, read_toml
from oapl_engine.data.benchmarks import BENCHMARKS
from oapl_engine.data.model_folder import resolve_model
from oapl_engine.data.render import renderer
from oapl_engine.data.sources import SOURCES, open_source, parse_source_task, unread_data_fields
from oapl_engine.data.task import load_task
from oapl_engine.errors import ConfigError
from oapl_engine.evaluation.evaluate import EvaluationResult, append_problems, evaluate, read_problems, warn_of_scale
from oapl_engine.files import name_disk_errors, read_json, replace_text
from oapl_engine.fingerprint import code_fingerprint, file_fingerprint, model_fingerprint
from oapl_engine.inference.protocol import Sampling
from oapl_engine.rollout.scorer import Scorer, check_records, check_reward, reward_of
from oapl_engine.rollout.session import EngineSession, recipe_engine_options
from oapl_engine.samples import Prompt
from oapl_engine.text import describe_dialogue, end_token_ids
from oapl_engine.trainer.checkpoint import load_newest
from oapl_engine.trainer.loading import load_tokenizer, read_text_config

UNUSED_SECTIONS = ("schedule", "objective", "train", "optimizer", "weights", "checkpoint", "report")
INSTEAD = {  # fields of a recipe that `oapl eval` has an argument for
    "evaluation.n": "--n",
    "evaluation.k": "--k",
    "evaluation.task": "--task",
    "run.dir": "--out",
    "model.path": "MODEL_OR_RUN",
}
UNUSED_FIELDS = ("model.attention", "model.lora_rank", "evaluation.every")
TASK_SECTIONS = ("data", "reward", "sampling")  # --task brings its own: a run's template or stop tokens are its task's
CONTENTS = ("content of data.path", "code of data.source", "code of the reward", "content of the model folder")
SAMPLES_KEPT = 512  # samples after which the counts are written

Log = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A model to evaluate: a folder, or the newest checkpoint of a run (`step`)."""

    label: str
    folder: str
    step: int = 0


@dataclass(frozen=True)
class ProblemSet:
    """What is asked, and how answers are scored unless the recipe says otherwise.

    left_out: problem id to tokens, of those that are too long for the model
    """

    prompts: tuple[Prompt, ...]
    verifier: str
    verifier_options: dict[str, Any]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Examinee:
    """A target, opened as far as it goes without its weights.

    ends:     token ids that end a response
    context:  tokens of prompt and response together, at most
    """

    target: Target
    recipe: Recipe
    tokenizer: Any
    ends: tuple[int, ...]
    problems: ProblemSet
    context: int


def find_target(path: str) -> Target:
    """The model that a path or name stands for. Raises ConfigError; CheckpointError where a run's are all damaged."""
    run = Path(path.rstrip("/"))
    if (run / "checkpoints").is_dir():
        newest = load_newest(run / "checkpoints")
        if not newest:
            raise ConfigError(f"{run} has no checkpoint yet: wait for its first publish, or name a model folder")
        return Target(run.name, str(newest.path), newest.step)
    return Target(run.name, resolve_model(path))


def name_apart(targets: Sequence[Target], paths: Sequence[str]) -> list[Target]:
    """Targets whose labels clash are called by their paths. Raises ConfigError where one is named twice."""
    if len({str(Path(path).resolve()) for path in paths}) < len(paths):
        raise ConfigError(f"a model is named twice among {', '.join(paths)}: name each once")
    labels = [target.label for target in targets]
    return [
        dataclasses.replace(target, label=path.strip("/")) if labels.count(target.label) > 1 else target
        for target, path in zip(targets, paths, strict=True)
    ]


def evaluation_recipe(
    models: Sequence[str], targets: Sequence[Target], task: str, n: int, ks: Sequence[int], overrides: list[str]
) -> Recipe:
    """The recipe of the first run among `models`, or defaults, with `--task`, `--n`, `--k` and overrides laid over.

    Of a run, `--task` keeps what belongs to the model and the engine only; the length of responses is then the
    benchmark's own, as far as the models' positions allow. Raises ConfigError.
    """
    configs = [Path(model) / "config.toml" for model in models]
    stored = [path for path in configs if path.exists()]
    tables = read_toml(stored[0]) if stored else {}
    unused = (*UNUSED_SECTIONS, *(TASK_SECTIONS if task else ()))
    tables = {section: table for section, table in tables.items() if section not in unused}
    if task:
        wanted = BENCHMARKS[task].max_new_tokens if task in BENCHMARKS else SamplingConfig().max_new_tokens
        room = [read_text_config(t.folder).get("max_position_embeddings") or 2 * wanted for t in targets]
        tables["sampling"] = {"max_new_tokens": min([wanted, *(positions // 2 for positions in room)])}
    tables = apply_overrides(tables, overrides, Recipe)
    _check_overrides(overrides, task)
    tables["evaluation"] = tables.get("evaluation", {}) | {"n": n, "k": list(ks)}
    recipe: Recipe = build(Recipe, tables, "oapl eval")
    if task:
        recipe = dataclasses.replace(recipe, data=parse_task(task, recipe.data))
    elif not recipe.data.task and not recipe.data.path and recipe.data.source in SOURCES:
        raise ConfigError(f"no run with a task of its own among {', '.join(models)}: name one, e.g. --task math500")
    if n < 1 or not all(1 <= k <= n for k in ks):
        raise ConfigError(f"--n {n} --k {','.join(map(str, ks))}: pass@k needs 1 <= k <= n")
    given = overridden_fields(overrides)  # a run's own recipe may hold what an override passed over
    unread = [field for field in unread_data_fields(recipe.data.source) if field in given]
    check_unread(recipe, "data.source", unread, overrides)
    return recipe


def _check_overrides(overrides: Sequence[str], task: str) -> None:
    """Raises ConfigError for an override that nothing here reads: it would change nothing, without a word."""
    named = {f"data.{field}": "--task" for field in _task_fields(task)} if task else {}
    for field in sorted(overridden_fields(overrides)):
        if instead := (INSTEAD | named).get(field):
            raise ConfigError(f"--{field} has no effect in oapl eval{' with --task' * (field in named)}: use {instead}")
        if field in UNUSED_FIELDS or field.partition(".")[0] in UNUSED_SECTIONS:
            raise ConfigError(f"--{field} has no effect in oapl eval: remove it")


def parse_task(task: str, data: DataConfig) -> DataConfig:
    """[data] for `--task`: a benchmark's name, or SOURCE:NAME (for a source that reads a file, SOURCE:FILE)."""
    return dataclasses.replace(data, **_task_fields(task))


def _task_fields(task: str) -> dict[str, Any]:
    if task in BENCHMARKS:
        return {"source": "benchmark", "task": task}
    fields = parse_source_task(task)
    if fields is None:
        raise ConfigError(
            f"--task {task}: one of {', '.join(BENCHMARKS)}, or SOURCE:NAME such as "
            '"micro:sort", "reasoning_gym:gcd", "jsonl:FILE"'
        )
    return fields


def problem_set(data: DataConfig, reward: RewardConfig, seed: int, tokenizer: object, full_set: bool) -> ProblemSet:
    """The problems of [data]: `full_set` takes all of a finite source, else those that training holds out.

    Problems over data.max_prompt_tokens are left out and listed. Raises ConfigError where none is left.
    """
    source = open_source(data)
    if not (full_set and source.finite):
        task = load_task(data, seed, tokenizer)
        return ProblemSet(task.held_out, source.verifier, source.verifier_options, task.dropped)
    render = renderer(data, tokenizer)
    problems = [source.problem(number) for number in range(source.size)]
    check_records(*reward_of(reward, source.verifier, source.verifier_options), problems)
    prompts = [Prompt(p.id, render(p), source.name, p.full_record) for p in problems]
    left_out = {p.id: len(p.token_ids) for p in prompts if len(p.token_ids) > data.max_prompt_tokens}
    kept = tuple(prompt for prompt in prompts if prompt.id not in left_out)
    if not kept:
        raise ConfigError(
            f"{source.name}: all {len(prompts)} problems are longer than {data.max_prompt_tokens} tokens: raise "
            "data.max_prompt_tokens, or lower sampling.max_new_tokens where the model's positions are the limit"
        )
    return ProblemSet(kept, source.verifier, source.verifier_options, left_out)


def evaluate_targets(
    targets: Sequence[Target], recipe: Recipe, full_set: bool, out: Path, log: Log
) -> list[EvaluationResult]:
    """One result per target, on the same problems: those that fit all of them. Raises ConfigError, also where `out`
    holds another model's counts, and RunError where too many responses get no reward."""
    examinees = [_prepare(target, recipe, full_set) for target in targets]
    left_out = {id: tokens for examinee in examinees for id, tokens in examinee.problems.left_out.items()}
    if left_out:
        names = ", ".join(f"{id} ({tokens} tokens)" for id, tokens in list(left_out.items())[:5])
        log(f"left out, too long for a model: {names}{f', … ({len(left_out)} in all)' if len(left_out) > 5 else ''}")
    folders = [out / _folder_name(target) for target in targets]
    for folder in folders:
        _make_folder(folder)
    with name_disk_errors(out):
        return [
            _evaluate_target(examinee, left_out, folder, log)
            for examinee, folder in zip(examinees, folders, strict=True)
        ]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: {folder} cannot be made: {error.strerror}; name a folder you may write to"
        ) from error


def _folder_name(target: Target) -> str:
    return target.label.replace("/", "-")


def _prepare(target: Target, recipe: Recipe, full_set: bool) -> Examinee:
    """Everything that can be wrong is found before an engine starts."""
    tokenizer = load_tokenizer(target.folder)
    ends = end_token_ids(target.folder, tokenizer, recipe.sampling.stop_token_ids)
    new_tokens = recipe.sampling.max_new_tokens
    context = recipe.data.max_prompt_tokens + new_tokens
    positions = read_text_config(target.folder).get("max_position_embeddings") or context
    if new_tokens >= positions:
        raise ConfigError(
            f"{target.folder} has {positions} positions for prompt and response together, sampling.max_new_tokens = "
            f"{new_tokens} leaves none for the prompt: lower it"
        )
    context = min(context, positions)
    data = dataclasses.replace(recipe.data, max_prompt_tokens=context - new_tokens)
    problems = problem_set(data, recipe.reward, recipe.run.seed, tokenizer, full_set)
    if not problems.prompts:
        raise ConfigError("no problem to evaluate: raise data.held_out")
    reward = reward_of(recipe.reward, problems.verifier, problems.verifier_options)
    check_reward(recipe.reward, *reward, problems.prompts[0].id, problems.prompts[0].record)
    return Examinee(target, recipe, tokenizer, ends, problems, context)


def _evaluate_target(examinee: Examinee, left_out: dict[str, int], out: Path, log: Log) -> EvaluationResult:
    target, n = examinee.target, examinee.recipe.evaluation.n
    prompts = [prompt for prompt in examinee.problems.prompts if prompt.id not in left_out]
    _check_same_settings(out, examinee)
    known = {problem for found in read_problems(out)[:1] for problem in found.problems}
    todo = [prompt for prompt in prompts if prompt.id not in known]
    if todo:
        for line in describe_dialogue(examinee.tokenizer, todo[0].token_ids, examinee.ends):
            log(f"{target.label}: {line}")
        log(f"{target.label}: {len(todo)} problems x {n} samples, engine starts")
        with _open_session(examinee, out, log) as session:
            for done in _count(session, examinee, todo, out):
                log(f"{target.label}: {done} of {len(todo)} problems")
    result = _in_order(read_problems(out)[0], [prompt.id for prompt in prompts])
    for line in warn_of_scale(result, examinee.recipe.evaluation.correct):
        log(f"{target.label}: {line}")
    return result


@contextmanager
def _open_session(examinee: Examinee, out: Path, log: Log) -> Iterator[EngineSession]:
    """Settings are kept once the engine is up: a start that failed binds nothing."""
    recipe, problems = examinee.recipe, examinee.problems
    options = recipe_engine_options(
        recipe, examinee.target.folder, examinee.context, seed=recipe.run.seed, takes_updates=False
    )
    scorer = Scorer(
        recipe.reward, problems.verifier, problems.verifier_options, examinee.tokenizer, examinee.ends, say=log
    )
    with EngineSession(options, out / "engine.log", scorer) as session:
        replace_text(out / "about.json", json.dumps(_settings(examinee)) + "\n")
        yield session


def _count(session: EngineSession, examinee: Examinee, prompts: Sequence[Prompt], out: Path) -> Iterator[int]:
    """Counts of `prompts` into `out`, SAMPLES_KEPT samples at a time; yields how many prompts are done."""
    recipe = examinee.recipe
    n = recipe.evaluation.n
    sampling = Sampling.from_recipe(recipe.sampling, examinee.ends, recipe.evaluation.temperature)
    size = max(1, SAMPLES_KEPT // n)
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        result = evaluate(
            session,
            chunk,
            n,
            sampling,
            correct=recipe.evaluation.correct,
            max_invalid_share=recipe.reward.max_invalid_share,
            step=examinee.target.step,
            version=0,
            seed=recipe.run.seed,
        )
        append_problems(result, out)
        yield start + len(chunk)


def _in_order(found: EvaluationResult, wanted: Sequence[str]) -> EvaluationResult:
    """An evaluation that was stopped and resumed lists problems in another order than one that was not."""
    at = {problem: i for i, problem in enumerate(found.problems)}
    return dataclasses.replace(
        found,
        problems=tuple(wanted),
        correct=tuple(found.correct[at[problem]] for problem in wanted),
        invalid=tuple(found.invalid[at[problem]] for problem in wanted),
        reward=tuple(found.reward[at[problem]] for problem in wanted),
    )


def _settings(examinee: Examinee) -> dict[str, Any]:
    """What a folder of results belongs to: one model, task and way of asking, sampling and scoring."""
    recipe = examinee.recipe
    data = dataclasses.asdict(recipe.data)
    del data["held_out"]  # problems may be added
    return {
        **data,
        CONTENTS[0]: file_fingerprint(recipe.data.path) if recipe.data.path else None,
        CONTENTS[1]: code_fingerprint(recipe.data.source),
        "reward": dataclasses.asdict(recipe.reward),
        CONTENTS[2]: code_fingerprint(recipe.reward.name or examinee.problems.verifier),
        "step": examinee.target.step,
        CONTENTS[3]: model_fingerprint(examinee.target.folder),
        **dataclasses.asdict(recipe.sampling),
        "ends": list(examinee.ends),
        "n": recipe.evaluation.n,
        "temperature": recipe.evaluation.temperature,
        "correct": recipe.evaluation.correct,
        "seed": recipe.run.seed,
    }


def _check_same_settings(out: Path, examinee: Examinee) -> None:
    """Raises ConfigError where `out` holds results with other settings."""
    file = out / "about.json"
    if not file.exists() or not read_problems(out):
        return
    settings = _settings(examinee)
    stored = read_json(file)
    different = [key for key in settings if stored.get(key) != settings[key]]
    if different:
        key = different[0]
        values = "" if key in CONTENTS else f" ({stored.get(key)!r:.60}, now {settings[key]!r:.60})"
        raise ConfigError(f"{out} holds results with another {key}{values}: name another --out, or remove it")
