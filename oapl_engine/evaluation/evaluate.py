"""Held-out pass@k of one policy version: generate, verify, write eval.jsonl and eval_problems.jsonl."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oapl_engine.errors import RunError
from oapl_engine.evaluation.pass_at_k import mean_and_error, paired_difference, pass_at_k_each
from oapl_engine.files import append_jsonl, read_jsonl
from oapl_engine.inference.protocol import Sampling
from oapl_engine.rewards import Verdict
from oapl_engine.rollout.scorer import too_many_invalid
from oapl_engine.rollout.session import EngineSession
from oapl_engine.samples import Prompt

ID_COLUMNS = ("step", "version", "task", "seed", "n", "temperature")
COLUMNS = (
    "step",
    "version",
    "task",
    "n",
    "k",
    "pass_at_k",
    "standard_error",
    "reward_mean",
    "reward_error",
    "invalid_share",
    "seed",
    "temperature",
)


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
    reward:         mean reward of each problem's other samples; nan where there is none
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
    reward: tuple[float, ...]

    @property
    def invalid_share(self) -> float:
        return sum(self.invalid) / (self.n * len(self.problems))

    def mean_reward(self) -> tuple[float, float]:
        """Mean over problems and its standard error; nan where no sample has a reward."""
        values = [value for value in self.reward if not math.isnan(value)]
        return mean_and_error(values) if values else (math.nan, math.nan)

    def describe(self) -> str:
        """pass@1, mean reward and the share of invalid responses, for people."""
        (correct, error), (reward, spread) = self.pass_at_k(1), self.mean_reward()
        return (
            f"{correct:.4f} ± {error:.4f}, reward {reward:.4f} ± {spread:.4f}, {self.invalid_share:.1%} invalid, on "
            f"{len(self.problems)} problems"
        )

    def pass_at_k(self, k: int = 1) -> tuple[float, float]:
        """Mean over problems and its standard error."""
        return mean_and_error(pass_at_k_each(self.n, self.correct, k))


def evaluate(
    session: EngineSession,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    *,
    correct: float,
    max_invalid_share: float,
    step: int,
    version: int,
    seed: int,
) -> EvaluationResult:
    """n samples per prompt from the session's engine, verified and counted. Raises EngineLostError.

    correct:            reward from which a response counts as correct; partial credit below it does not
    max_invalid_share:  share of responses without a reward above which the result would mislead: RunError

    Raises ValueError where the session returns another number of samples or verdicts than asked for.
    """
    each = _verdicts(session, prompts, n, sampling)
    failed = [verdict for group in each for verdict in group if verdict.status != "scored"]
    share = len(failed) / (n * len(prompts))
    if share > max_invalid_share:
        raise RunError(too_many_invalid(share, max_invalid_share, failed[-1]))
    rewards = [[v.reward for v in group if v.reward is not None] for group in each]
    return EvaluationResult(
        step=step,
        version=version,
        task=prompts[0].task,
        seed=seed,
        n=n,
        temperature=sampling.temperature,
        problems=tuple(prompt.id for prompt in prompts),
        correct=tuple(sum(reward >= correct for reward in group) for group in rewards),
        invalid=tuple(sum(v.status != "scored" for v in group) for group in each),
        reward=tuple(sum(group) / len(group) if group else math.nan for group in rewards),
    )


def warn_of_scale(result: EvaluationResult, correct: float) -> list[str]:
    """A line where rewards are on a larger scale than `correct`: pass@k would count almost everything as correct."""
    largest = max((reward for reward in result.reward if math.isfinite(reward)), default=-math.inf)
    if largest <= correct:
        return []
    return [
        f"warning: rewards reach {largest:g} and more, and every response from evaluation.correct = {correct:g} counts "
        "as correct in pass@k: set it to the reward of a right answer"
    ]


def _verdicts(session: EngineSession, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[list[Verdict]]:
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
    return [verdicts[i : i + n] for i in range(0, len(pairs), n)]


def append_evaluation(result: EvaluationResult, ks: Sequence[int], run_dir: str | Path) -> None:
    """One line per k to eval.jsonl, one line per problem to eval_problems.jsonl (for paired comparison)."""
    lines = []
    reward, reward_error = result.mean_reward()
    shared = {
        "reward_mean": _finite(reward),
        "reward_error": _finite(reward_error),
        "invalid_share": result.invalid_share,
    }
    for k in ks:
        mean, error = result.pass_at_k(k)
        row = _identity(result) | shared | {"k": k, "pass_at_k": mean, "standard_error": _finite(error)}
        lines.append({name: row[name] for name in COLUMNS})
    append_problems(result, run_dir)
    append_jsonl(Path(run_dir) / "eval.jsonl", lines)


def append_problems(result: EvaluationResult, run_dir: str | Path) -> None:
    """One line per problem to eval_problems.jsonl."""
    counts = zip(result.problems, result.correct, result.invalid, result.reward, strict=True)
    rows = [
        _identity(result) | {"problem": p, "correct": c, "invalid": i, "reward": _finite(r)} for p, c, i, r in counts
    ]
    append_jsonl(Path(run_dir) / "eval_problems.jsonl", rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _identity(result: EvaluationResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in ID_COLUMNS}


def compare(before: EvaluationResult, after: EvaluationResult, k: int = 1) -> tuple[float, float]:
    """Paired difference of pass@k, after − before, and its standard error. Raises ValueError on other problems."""
    if before.problems != after.problems:
        raise ValueError(f"evaluations of steps {before.step} and {after.step} are not on the same problems")
    return paired_difference(before.n, before.correct, after.correct, k, after.n)


def compare_rewards(before: EvaluationResult, after: EvaluationResult) -> tuple[float, float]:
    """Paired difference of mean rewards, after − before, and its standard error; nan where none can be compared."""
    pairs = zip(before.reward, after.reward, strict=True)
    differences = [new - old for old, new in pairs if math.isfinite(new - old)]
    return mean_and_error(differences) if differences else (math.nan, math.nan)


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
            reward=tuple(_or_nan(row.get("reward")) for row in rows.values()),
        )
        for key, rows in found.items()
    ]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
