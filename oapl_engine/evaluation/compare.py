"""`oapl eval`: pass@k of models and runs on the same problems, each served by an engine of its own.

The counts of every problem are kept in OUT/LABEL/eval_problems.jsonl as they come: the same command goes on from there.
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
from oapl_engine.data.task import load_task, open_source
from oapl_engine.errors import ConfigError
from oapl_engine.evaluation.evaluate import Evaluated, append_problems, evaluate, read_problems
from oapl_engine.inference.protocol import Sampling
from oapl_engine.inference.supervisor import EngineOptions, engine_options, start_engine
from oapl_engine.rewards import Verdict, VerifierPool
from oapl_engine.rollout.collector import Collector
from oapl_engine.samples import Prompt
from oapl_engine.trainer.checkpoint import load_newest
from oapl_engine.trainer.policy import load_tokenizer

UNUSED = ("schedule", "objective", "train", "optimizer", "weights", "checkpoint", "report")
SAMPLES_KEPT = 512  # samples after which the counts are written

Say = Callable[[str], None]
Pairs = Sequence[tuple[Prompt, Sequence[int]]]
Scoring = tuple[str, dict[str, Any]]  # a verifier's name and its options


@dataclass(frozen=True)
class Target:
    """A model to evaluate: a folder, or the newest checkpoint of a run (`step`)."""

    label: str
    folder: str
    step: int = 0


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
    stored = [path for model in models if (path := Path(model) / "config.toml").exists()]
    tables = read_toml(stored[0]) if stored else {}
    tables = apply_overrides({s: t for s, t in tables.items() if s not in UNUSED}, overrides, Recipe)
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
    """[data] for `--task`: a benchmark's name, or source:task (jsonl: source:file)."""
    if task in BENCHMARKS:
        return dataclasses.replace(data, source="benchmark", task=task)
    source, colon, name = task.partition(":")
    if not colon or source not in ("micro", "reasoning_gym", "hf", "jsonl"):
        names = ", ".join(BENCHMARKS)
        raise ConfigError(
            f'--task {task}: one of {names}, or SOURCE:NAME such as "micro:sort", "reasoning_gym:gcd", "jsonl:FILE"'
        )
    chosen = {"path": name} if source == "jsonl" else {"task": name}
    return dataclasses.replace(data, source=source, **chosen)  # type: ignore[arg-type]


def problems(data: DataConfig, seed: int, tokenizer: object, whole: bool) -> tuple[tuple[Prompt, ...], Scoring]:
    """Prompts and scoring: `whole` takes every problem of a finite set, else those that training holds out."""
    source = open_source(data)
    if not (whole and source.finite):
        task = load_task(data, seed, tokenizer)
        return task.held_out, (task.verifier, task.verifier_options)
    render = renderer(data, tokenizer)
    each = map(source.problem, range(source.size))
    prompts = tuple(Prompt(p.id, render(p.question), source.name, p.record) for p in each)
    return prompts, (source.verifier, source.verifier_options)


def evaluate_targets(targets: Sequence[Target], recipe: Recipe, whole: bool, out: Path, say: Say) -> list[Evaluated]:
    """One result a target, on the same problems. Raises ConfigError, also where `out` holds another model's counts."""
    labels = [target.label for target in targets]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"two models are called {', '.join(labels)}: rename a folder, results are kept by name")
    return [_evaluate_target(target, recipe, whole, out / target.label, say) for target in targets]


def _evaluate_target(target: Target, recipe: Recipe, whole: bool, out: Path, say: Say) -> Evaluated:
    tokenizer = load_tokenizer(target.folder)
    prompts, (verifier, options) = problems(recipe.data, recipe.run.seed, tokenizer, whole)
    if not prompts:
        raise ConfigError("no problem to evaluate: raise data.held_out")
    _bind(out, target, recipe)
    known = set(read_problems(out)[0].problems if (out / "eval_problems.jsonl").exists() else ())
    todo = [p for p in prompts if p.id not in known]
    if todo:
        say(f"{target.label}: {len(todo)} problems x {recipe.evaluation.n} samples, engine starts")
        scoring = (recipe.reward.name or verifier, options | recipe.reward.options)
        _generate(target, recipe, tokenizer, todo, scoring, out, say)
    return _in_order(read_problems(out)[0], [p.id for p in prompts])


def _in_order(found: Evaluated, wanted: Sequence[str]) -> Evaluated:
    """An evaluation that was stopped and went on lists problems in another order than one that was not."""
    at = {problem: i for i, problem in enumerate(found.problems)}
    correct, invalid = (tuple(counts[at[p]] for p in wanted) for counts in (found.correct, found.invalid))
    return dataclasses.replace(found, problems=tuple(wanted), correct=correct, invalid=invalid)


def _bind(out: Path, target: Target, recipe: Recipe) -> None:
    """A folder of results belongs to one model, task and way of asking, sampling and scoring; problems may be added."""
    weights = sorted(Path(target.folder).glob("*.safetensors"))
    sampling = {"n": recipe.evaluation.n, "temperature": recipe.evaluation.temperature, "seed": recipe.run.seed}
    about = {
        **{name: value for name, value in dataclasses.asdict(recipe.data).items() if name != "held_out"},
        "reward": dataclasses.asdict(recipe.reward),
        "step": target.step,
        "weights": [[w.name, w.stat().st_size, w.stat().st_mtime_ns] for w in weights],
        **dataclasses.asdict(recipe.sampling),
        **sampling,
    }
    file = out / "about.json"
    if file.exists() and (stored := json.loads(file.read_text())) != about:
        different = next(key for key in about if stored.get(key) != about[key])
        raise ConfigError(
            f"{out} holds results with another {different} ({stored.get(different)!r:.60}, now "
            f"{about[different]!r:.60}): name another --out, or remove it"
        )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about) + "\n")


def _engine_options(target: Target, recipe: Recipe, prompts: Sequence[Prompt]) -> EngineOptions:
    longest = max(len(p.token_ids) for p in prompts) + recipe.sampling.max_new_tokens
    positions = getattr(AutoConfig.from_pretrained(target.folder).get_text_config(), "max_position_embeddings", longest)
    if longest > positions:
        raise ConfigError(
            f"{target.folder} has {positions} positions, the longest prompt and sampling.max_new_tokens = "
            f"{recipe.sampling.max_new_tokens} need {longest}: lower it"
        )
    fixed = {"weight_backend": "", "worker_extension": ""}
    return engine_options(recipe, target.folder, longest, seed=recipe.run.seed, **fixed)


def _generate(
    target: Target, recipe: Recipe, tokenizer: Any, prompts: Sequence[Prompt], scoring: Scoring, out: Path, say: Say
) -> None:
    """Counts of `prompts` into `out`, SAMPLES_KEPT samples at a time."""
    r, evaluation = recipe.reward, recipe.evaluation
    sampling = Sampling(**dataclasses.asdict(recipe.sampling) | {"temperature": evaluation.temperature})
    size = max(1, SAMPLES_KEPT // evaluation.n)
    options = _engine_options(target, recipe, prompts)
    with (
        VerifierPool(r.workers, r.timeout_seconds, r.memory_mb) as pool,
        start_engine(options, out / "engine.log") as e,
    ):
        collector = Collector(e.client)

        def generate(prompts: Sequence[Prompt], n: int, _: float) -> list[list[list[int]]]:
            found = collector.generate_many(prompts, n, sampling)
            return [[x.ids().tolist() for x in group] for group in found]

        def verify(pairs: Pairs) -> list[Verdict]:
            text = [(tokenizer.decode(ids, skip_special_tokens=True), prompt.record) for prompt, ids in pairs]
            return pool.verify_many(scoring[0], text, scoring[1])

        try:
            for start in range(0, len(prompts), size):
                chunk = prompts[start : start + size]
                arguments = {"step": target.step, "version": 0, "seed": recipe.run.seed}
                append_problems(evaluate(chunk, generate, verify, evaluation, **arguments), out)
                say(f"{target.label}: {start + len(chunk)} of {len(prompts)} problems")
        finally:
            collector.close()
