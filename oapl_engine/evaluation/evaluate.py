"""Held-out pass@k of one policy version: generate, verify, write eval.jsonl and eval_problems.jsonl."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oapl_engine.config import EvaluationConfig
from oapl_engine.evaluation.pass_at_k import mean_and_error, paired_difference, pass_at_k_each
from oapl_engine.rewards import Verdict
from oapl_engine.samples import Prompt

TokenIds = Sequence[int]
Generate = Callable[[Sequence[Prompt], int, float], Sequence[Sequence[TokenIds]]]
Verify = Callable[[Sequence[tuple[Prompt, TokenIds]]], Sequence[Verdict]]
ABOUT = ("step", "version", "task", "seed", "n", "temperature")
COLUMNS = ("step", "version", "task", "n", "k", "pass_at_k", "standard_error", "seed", "temperature")
CORRECT = 1.0  # reward from which a response counts as correct; partial credit below it does not


@dataclass(frozen=True)
class Evaluated:
    """Counts of one evaluation, in the order of the prompts: `correct` of `n` samples each, `invalid` without a reward.

    An invalid sample counts as not correct.
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
    prompts: Sequence[Prompt],
    generate: Generate,
    verify: Verify,
    settings: EvaluationConfig,
    *,
    step: int,
    version: int,
    seed: int,
) -> Evaluated:
    """settings.n samples a prompt, verified and counted.

    generate(prompts, n, temperature) -> for each prompt n responses as token ids; verify([(prompt, response), …]) ->
    their verdicts. Raises ValueError where either returns another number than asked for.
    """
    if not prompts:
        raise ValueError("no held-out problem to evaluate: raise data.held_out, or set evaluation.n = 0")
    groups = generate(prompts, settings.n, settings.temperature)
    if [len(g) for g in groups] != [settings.n] * len(prompts):
        raise ValueError(f"generate returned groups of {[len(g) for g in groups]}, not {len(prompts)} of {settings.n}")
    pairs = [(prompt, response) for prompt, group in zip(prompts, groups, strict=True) for response in group]
    verdicts = verify(pairs)
    if len(verdicts) != len(pairs):
        raise ValueError(f"verify returned {len(verdicts)} verdicts on {len(pairs)} responses")
    each = [verdicts[i : i + settings.n] for i in range(0, len(pairs), settings.n)]
    invalid = tuple(sum(v.status != "scored" for v in group) for group in each)
    correct = tuple(sum(v.reward is not None and v.reward >= CORRECT for v in group) for group in each)
    about = (step, version, prompts[0].task, seed, settings.n, settings.temperature)
    return Evaluated(*about, tuple(p.id for p in prompts), correct, invalid)


def append_evaluation(result: Evaluated, ks: Sequence[int], run_dir: str | Path) -> None:
    """One line a k to eval.jsonl, one line a problem to eval_problems.jsonl (for paired comparison)."""
    lines = []
    for k in ks:
        mean, error = result.pass_at_k(k)
        measured = {"k": k, "pass_at_k": mean, "standard_error": None if math.isnan(error) else error}
        row = _about(result) | measured
        lines.append({name: row[name] for name in COLUMNS})
    append_problems(result, run_dir)
    _append(Path(run_dir) / "eval.jsonl", lines)


def append_problems(result: Evaluated, run_dir: str | Path) -> None:
    """One line a problem to eval_problems.jsonl."""
    counts = zip(result.problems, result.correct, result.invalid, strict=True)
    rows = [_about(result) | {"problem": p, "correct": c, "invalid": i} for p, c, i in counts]
    _append(Path(run_dir) / "eval_problems.jsonl", rows)


def _about(result: Evaluated) -> dict[str, Any]:
    return {name: getattr(result, name) for name in ABOUT}


def compare(before: Evaluated, after: Evaluated, k: int = 1) -> tuple[float, float]:
    """Paired difference of pass@k, after − before, and its standard error. Raises ValueError on other problems."""
    if before.problems != after.problems:
        raise ValueError(f"evaluations of steps {before.step} and {after.step} are not on the same problems")
    return paired_difference(before.n, before.correct, after.correct, k, after.n)


def read_problems(run_dir: str | Path) -> list[Evaluated]:
    """The evaluations of a run from eval_problems.jsonl, oldest first; one repeated after a resume counts once."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for line in (Path(run_dir) / "eval_problems.jsonl").read_text().splitlines():
        row = json.loads(line)
        key = tuple(row[name] for name in ABOUT)
        found.setdefault(key, {})[row["problem"]] = row
    fields = ("problem", "correct", "invalid")
    return [Evaluated(*key, *(tuple(r[f] for r in rows.values()) for f in fields)) for key, rows in found.items()]


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
