"""`oapl eval`: pass@k of models and runs on the same problems, each served by an engine of its own.

The counts of every problem are kept in OUT/LABEL/eval_problems.jsonl as they come; the same command resumes from there.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from oapl_engine.config import DataConfig, Recipe
from oapl_engine.config_file import apply_overrides, build, read_toml
from oapl_engine.data.benchmarks import BENCHMARKS
from oapl_engine.data.model_folder import resolve_model
from oapl_engine.data.render import renderer
from oapl_engine.data.sources import open_source, parse_source_task
from oapl_engine.data.task import load_task
from oapl_engine.errors import ConfigError
from oapl_engine.evaluation.evaluate import EvaluationResult, append_problems, evaluate, read_problems
from oapl_engine.inference.protocol import Sampling
from oapl_engine.rollout.scorer import open_scorer
from oapl_engine.rollout.session import EngineSession, recipe_engine_options
from oapl_engine.samples import Prompt
from oapl_engine.trainer.checkpoint import load_newest
from oapl_engine.trainer.loading import load_tokenizer

UNUSED_SECTIONS = ("schedule", "objective", "train", "optimizer", "weights", "checkpoint", "report")
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
    """What is asked, and how answers are scored unless the recipe says otherwise."""

    prompts: tuple[Prompt, ...]
    verifier: str
    verifier_options: dict[str, Any]


def find_target(path: str) -> Target:
    """The model that a path or name stands for. Raises ConfigError; CheckpointError where a run's are all damaged."""
    run = Path(path)
    if (run / "checkpoints").is_dir():
        newest = load_newest(run / "checkpoints")
        if not newest:
            raise ConfigError(f"{run} has no checkpoint yet: wait for its first publish, or name a model folder")
        return Target(run.name, str(newest.path), newest.step)
    return Target(run.name, resolve_model(path))


def evaluation_recipe(models: Sequence[str], task: str, n: int, ks: Sequence[int], overrides: list[str]) -> Recipe:
    """The recipe of the first run among `models`, or defaults, with `--task`, `--n`, `--k` and overrides laid over.
    Raises ConfigError."""
    configs = [Path(model) / "config.toml" for model in models]
    stored = [path for path in configs if path.exists()]
    tables = read_toml(stored[0]) if stored else {}
    tables = {section: table for section, table in tables.items() if section not in UNUSED_SECTIONS}
    tables = apply_overrides(tables, overrides, Recipe)
    tables["evaluation"] = tables.get("evaluation", {}) | {"n": n, "k": list(ks)}
    recipe: Recipe = build(Recipe, tables, "oapl eval")
    if task:
        recipe = dataclasses.replace(recipe, data=parse_task(task, recipe.data))
    elif not recipe.data.task and not recipe.data.path:
        raise ConfigError(f"no run with a task of its own among {', '.join(models)}: name one, e.g. --task math500")
    if n < 1 or not all(1 <= k <= n for k in ks):
        raise ConfigError(f"--n {n} --k {','.join(map(str, ks))}: pass@k needs 1 <= k <= n")
    return recipe


def parse_task(task: str, data: DataConfig) -> DataConfig:
    """[data] for `--task`: a benchmark's name, or SOURCE:NAME (for a source that reads a file, SOURCE:FILE)."""
    if task in BENCHMARKS:
        return dataclasses.replace(data, source="benchmark", task=task)
    fields = parse_source_task(task)
    if fields is None:
        raise ConfigError(
            f"--task {task}: one of {', '.join(BENCHMARKS)}, or SOURCE:NAME such as "
            '"micro:sort", "reasoning_gym:gcd", "jsonl:FILE"'
        )
    return dataclasses.replace(data, **fields)


def problem_set(data: DataConfig, seed: int, tokenizer: object, full_set: bool) -> ProblemSet:
    """The problems of [data]: `full_set` takes all of a finite source, else those that training holds out."""
    source = open_source(data)
    if not (full_set and source.finite):
        task = load_task(data, seed, tokenizer)
        return ProblemSet(task.held_out, source.verifier, source.verifier_options)
    render = renderer(data, tokenizer)
    problems = map(source.problem, range(source.size))
    prompts = tuple(Prompt(p.id, render(p.question), source.name, p.record) for p in problems)
    return ProblemSet(prompts, source.verifier, source.verifier_options)


def evaluate_targets(
    targets: Sequence[Target], recipe: Recipe, full_set: bool, out: Path, log: Log
) -> list[EvaluationResult]:
    """One result per target, on the same problems. ConfigError, also where `out` holds another model's counts."""
    labels = [target.label for target in targets]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"two models are called {', '.join(labels)}: rename a folder, results are kept by name")
    return [_evaluate_target(target, recipe, full_set, out / target.label, log) for target in targets]


def _evaluate_target(target: Target, recipe: Recipe, full_set: bool, out: Path, log: Log) -> EvaluationResult:
    tokenizer = load_tokenizer(target.folder)
    problems = problem_set(recipe.data, recipe.run.seed, tokenizer, full_set)
    if not problems.prompts:
        raise ConfigError("no problem to evaluate: raise data.held_out")
    _check_same_settings(out, target, recipe)
    known = set(read_problems(out)[0].problems if (out / "eval_problems.jsonl").exists() else ())
    todo = [prompt for prompt in problems.prompts if prompt.id not in known]
    if todo:
        log(f"{target.label}: {len(todo)} problems x {recipe.evaluation.n} samples, engine starts")
        with _open_session(target, recipe, tokenizer, problems, todo, out) as session:
            _count(session, target, recipe, todo, out, log)
    return _in_order(read_problems(out)[0], [prompt.id for prompt in problems.prompts])


def _open_session(
    target: Target, recipe: Recipe, tokenizer: Any, problems: ProblemSet, todo: Sequence[Prompt], out: Path
) -> EngineSession:
    longest = max(len(prompt.token_ids) for prompt in todo) + recipe.sampling.max_new_tokens
    settings = AutoConfig.from_pretrained(target.folder).get_text_config()
    positions = getattr(settings, "max_position_embeddings", longest)
    if longest > positions:
        raise ConfigError(
            f"{target.folder} has {positions} positions, the longest prompt and sampling.max_new_tokens = "
            f"{recipe.sampling.max_new_tokens} need {longest}: lower it"
        )
    options = recipe_engine_options(recipe, target.folder, longest, seed=recipe.run.seed, takes_updates=False)
    scorer = open_scorer(recipe.reward, problems.verifier, problems.verifier_options, tokenizer)
    return EngineSession(options, out / "engine.log", scorer)


def _count(
    session: EngineSession, target: Target, recipe: Recipe, prompts: Sequence[Prompt], out: Path, log: Log
) -> None:
    """Counts of `prompts` into `out`, SAMPLES_KEPT samples at a time."""
    n = recipe.evaluation.n
    sampling = Sampling.from_recipe(recipe.sampling, temperature=recipe.evaluation.temperature)
    size = max(1, SAMPLES_KEPT // n)
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        result = evaluate(session, chunk, n, sampling, step=target.step, version=0, seed=recipe.run.seed)
        append_problems(result, out)
        log(f"{target.label}: {start + len(chunk)} of {len(prompts)} problems")


def _in_order(found: EvaluationResult, wanted: Sequence[str]) -> EvaluationResult:
    """An evaluation that was stopped and resumed lists problems in another order than one that was not."""
    at = {problem: i for i, problem in enumerate(found.problems)}
    return dataclasses.replace(
        found,
        problems=tuple(wanted),
        correct=tuple(found.correct[at[problem]] for problem in wanted),
        invalid=tuple(found.invalid[at[problem]] for problem in wanted),
    )


def _check_same_settings(out: Path, target: Target, recipe: Recipe) -> None:
    """A folder of results belongs to one model, task and way of asking, sampling and scoring; problems may be added."""
    weights = sorted(Path(target.folder).glob("*.safetensors"))
    data = dataclasses.asdict(recipe.data)
    del data["held_out"]
    settings = {
        **data,
        "reward": dataclasses.asdict(recipe.reward),
        "step": target.step,
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights],
        **dataclasses.asdict(recipe.sampling),
        "n": recipe.evaluation.n,
        "temperature": recipe.evaluation.temperature,
        "seed": recipe.run.seed,
    }
    file = out / "about.json"
    if file.exists():
        stored = json.loads(file.read_text())
        different = [key for key in settings if stored.get(key) != settings[key]]
        if different:
            key = different[0]
            raise ConfigError(
                f"{out} holds results with another {key} ({stored.get(key)!r:.60}, now {settings[key]!r:.60}): name "
                "another --out, or remove it"
            )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings) + "\n")
