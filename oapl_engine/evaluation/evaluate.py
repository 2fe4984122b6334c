"""Held-out pass@k of one policy version: generate, verify, write eval.jsonl and eval_problems.jsonl."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oapl_engine.evaluation.pass_at_k import mean_and_error, paired_difference, pass_at_k_each
from oapl_engine.files import append_jsonl, read_jsonl
from oapl_engine.inference.protocol import Sampling
from oapl_engine.rollout.session import EngineSession
from oapl_engine.samples import Prompt

ID_COLUMNS = ("step", "version", "task", "seed", "n", "temperature")
COLUMNS = ("step", "version", "task", "n", "k", "pass_at_k", "standard_error", "seed", "temperature")
CORRECT = 1.0  # reward from which a response counts as correct; partial credit below it does not


@dataclass(frozen=True)
class EvaluationResult:
    """Counts of one evaluation, in the order of the prompts.

    step, version:  of the policy that answered
    task, seed:     which problems, and the seed of the run
    n:              samples per problem
    temperature:    of sampling
    problems:       ids
    correct:        correct samples of each problem, out of n
    invalid:        samples of each problem without a reward; they count as not correct
    """

    step: int
    version: int
    task: str
    seed: int
    n: int
    temperature: float
    problems: tuple[str, ...]
    correct: tuple[int, ...]
    invalid: tuple[int, ...]

    def pass_at_k(self, k: int = 1) -> tuple[float, float]:
        """Mean over problems and its standard error."""
        return mean_and_error(pass_at_k_each(self.n, self.correct, k))


def evaluate(
    session: EngineSession,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    *,
    step: int,
    version: int,
    seed: int,
) -> EvaluationResult:
    """n samples per prompt from the session's engine, verified and counted. Raises EngineLostError.

    Raises ValueError where the session returns another number of samples or verdicts than asked for.
    """
    if not prompts:
        raise ValueError("no held-out problem to evaluate: raise data.held_out, or set evaluation.n = 0")
    groups = session.generate(prompts, n, sampling)
    if [len(group) for group in groups] != [n] * len(prompts):
        sizes = [len(group) for group in groups]
        raise ValueError(f"the engine returned groups of {sizes}, not {len(prompts)} of {n}")
    pairs = [(prompt, sample.ids()) for prompt, group in zip(prompts, groups, strict=True) for sample in group]
    verdicts = session.verify(pairs)
    if len(verdicts) != len(pairs):
        raise ValueError(f"the verifier returned {len(verdicts)} verdicts on {len(pairs)} responses")
    each = [verdicts[i : i + n] for i in range(0, len(pairs), n)]
    return EvaluationResult(
        step=step,
        version=version,
        task=prompts[0].task,
        seed=seed,
        n=n,
        temperature=sampling.temperature,
        problems=tuple(prompt.id for prompt in prompts),
        correct=tuple(sum(v.reward is not None and v.reward >= CORRECT for v in group) for group in each),
        invalid=tuple(sum(v.status != "scored" for v in group) for group in each),
    )


def append_evaluation(result: EvaluationResult, ks: Sequence[int], run_dir: str | Path) -> None:
    """One line per k to eval.jsonl, one line per problem to eval_problems.jsonl (for paired comparison)."""
    lines = []
    for k in ks:
        mean, error = result.pass_at_k(k)
        measured = {"k": k, "pass_at_k": mean, "standard_error": None if math.isnan(error) else error}
        row = _identity(result) | measured
        lines.append({name: row[name] for name in COLUMNS})
    append_problems(result, run_dir)
    append_jsonl(Path(run_dir) / "eval.jsonl", lines)


def append_problems(result: EvaluationResult, run_dir: str | Path) -> None:
    """One line per problem to eval_problems.jsonl."""
    counts = zip(result.problems, result.correct, result.invalid, strict=True)
    rows = [_identity(result) | {"problem": p, "correct": c, "invalid": i} for p, c, i in counts]
    append_jsonl(Path(run_dir) / "eval_problems.jsonl", rows)


def _identity(result: EvaluationResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in ID_COLUMNS}


def compare(before: EvaluationResult, after: EvaluationResult, k: int = 1) -> tuple[float, float]:
    """Paired difference of pass@k, after − before, and its standard error. Raises ValueError on other problems."""
    if before.problems != after.problems:
        raise ValueError(f"evaluations of steps {before.step} and {after.step} are not on the same problems")
    return paired_difference(before.n, before.correct, after.correct, k, after.n)


def read_problems(run_dir: str | Path) -> list[EvaluationResult]:
    """The evaluations of a run from eval_problems.jsonl, oldest first; one repeated after a resume counts once."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in read_jsonl(Path(run_dir) / "eval_problems.jsonl"):
        key = tuple(row[name] for name in ID_COLUMNS)
        found.setdefault(key, {})[row["problem"]] = row
    return [
        EvaluationResult(
            **dict(zip(ID_COLUMNS, key, strict=True)),
            problems=tuple(rows),
            correct=tuple(row["correct"] for row in rows.values()),
            invalid=tuple(row["invalid"] for row in rows.values()),
        )
        for key, rows in found.items()
    ]
