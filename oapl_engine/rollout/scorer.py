"""From the token ids of a response to a verdict: decode, then verify in a process that can be killed."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

from oapl_engine.config import RewardConfig
from oapl_engine.data.problem import Problem
from oapl_engine.errors import ConfigError, RunError
from oapl_engine.rewards import Verdict, VerifierPool, check_record
from oapl_engine.rewards.verdict import check_verifier
from oapl_engine.samples import Prompt
from oapl_engine.text import TokenIds, response_text

NONSENSE = "I do not know."  # what an untrained model answers: a verifier gives it a reward too
CHECK_SECONDS = 30.0  # of a start, for reading all answers
FEWEST, RECENT = 32, 256  # verdicts that a share is judged on, and those that are remembered


class InvalidShare:
    """Watches how many responses get no reward. Safe to use from several threads.

    limit:  reward.max_invalid_share
    say:    receives the first verdict without a reward as a line
    """

    def __init__(self, limit: float, say: Callable[[str], None] = lambda text: None) -> None:
        self.limit = limit
        self._say = say
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._said = self._raised = False
        self._lock = threading.Lock()

    def count(self, prompt: Prompt, verdict: Verdict) -> None:
        """Raises RunError, once, where more than `limit` of the recent responses have no reward."""
        self.tell(prompt, verdict)
        failed = verdict.status != "scored"
        with self._lock:
            self._recent.append(failed)
            share = sum(self._recent) / len(self._recent)
            ends = failed and len(self._recent) >= FEWEST and share > self.limit and not self._raised
            self._raised = self._raised or ends
        if ends:
            raise RunError(too_many_invalid(share, self.limit, verdict))

    def tell(self, prompt: Prompt, verdict: Verdict) -> None:
        """Say the first verdict without a reward."""
        failed = verdict.status != "scored"
        with self._lock:
            first, self._said = failed and not self._said, self._said or failed
        if first:
            self._say(f"first response without a reward, to problem {prompt.id}: {why_invalid(verdict)}")


def why_invalid(verdict: Verdict) -> str:
    """What a verdict without a reward says of its reason, its traceback included."""
    return str(verdict.detail.get("traceback") or verdict.detail.get("reason")).strip()


def too_many_invalid(share: float, limit: float, last: Verdict) -> str:
    """The message that ends a run or an evaluation."""
    return (
        f"{share:.0%} of the responses got no reward (reward.max_invalid_share = {limit:g}). A verifier gives wrong "
        f"answers a reward of 0 and fails only where the record is unusable. The last one: {why_invalid(last)}"
    )


class Scorer:
    """A verifier by name, its options, the processes that run it, and what turns tokens into text.

    tokenizer, ends:  of the policy; token ids that end a response
    invalid:          told of every verdict on a response that may be trained on
    timed:            makes a context that measures the seconds of one verdict
    """

    def __init__(
        self,
        reward: RewardConfig,
        verifier: str,
        options: dict[str, Any],
        tokenizer: Any,
        ends: tuple[int, ...],
        say: Callable[[str], None] = lambda text: None,
        timed: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Verifier and options are the data source's, used where [reward] names none; `say` receives lines for the
        user. Raises ConfigError for an unknown verifier or option. To be closed."""
        self.name, self.options = reward_of(reward, verifier, options)
        self.tokenizer, self.ends = tokenizer, ends
        self.invalid = InvalidShare(reward.max_invalid_share, say)
        self.timed = timed
        self.pool = VerifierPool(reward.workers, reward.timeout_seconds, reward.memory_mb)

    async def verify(self, prompt: Prompt, response: TokenIds) -> Verdict:
        """The verdict on one response [R]. Raises RunError where too many have no reward."""
        text = response_text(self.tokenizer, response, self.ends)
        with self.timed():  # next to generation: these seconds overlap
            verdict = await self.pool.verify(self.name, text, prompt.record, self.options)
        self.invalid.count(prompt, verdict)
        return verdict

    def verify_many(self, pairs: Sequence[tuple[Prompt, TokenIds]]) -> list[Verdict]:
        """Verdicts on (prompt, response) pairs, in their order."""
        items = [(response_text(self.tokenizer, response, self.ends), prompt.record) for prompt, response in pairs]
        verdicts = self.pool.verify_many(self.name, items, self.options)
        for (prompt, _), verdict in zip(pairs, verdicts, strict=True):
            self.invalid.tell(prompt, verdict)
        return verdicts

    def close(self) -> None:
        """End the verifier processes."""
        self.pool.close()


def reward_of(reward: RewardConfig, verifier: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of the verifier: those of [reward] over the data source's. Raises ConfigError."""
    name, merged = reward.name or verifier, (options if reward.name in ("", verifier) else {}) | reward.options
    check_verifier(name, merged)
    return name, merged


def check_reward(
    reward: RewardConfig, name: str, options: dict[str, Any], problem: str, record: dict[str, Any]
) -> None:
    """Score a problem's answer, and nonsense, in a verifier process. Raises ConfigError, with the verifier's traceback,
    where there is no reward: found before an engine starts."""
    responses = [str(record.get("answer", NONSENSE)), NONSENSE]
    with closing(VerifierPool(1, reward.timeout_seconds, reward.memory_mb)) as pool:
        verdicts = pool.verify_many(name, [(response, record) for response in responses], options)
    for response, verdict in zip(responses, verdicts, strict=True):
        if verdict.status != "scored":
            raise ConfigError(
                f'reward.name = "{name}" gives no reward to the response {response!r:.80} to problem {problem}, whose '
                f"record has {', '.join(record)}: {why_invalid(verdict)}"
            )


def check_records(
    name: str, options: dict[str, Any], problems: Sequence[Problem], seconds: float = CHECK_SECONDS
) -> int:
    """Raises ConfigError, with the place, for a problem whose record the verifier cannot use: an answer that cannot be
    read would make every response wrong. Returns how many were checked within `seconds`; the others are left to the
    run, which reports a record that fails."""
    end = time.monotonic() + seconds
    for number, problem in enumerate(problems):
        if time.monotonic() > end:
            return number
        try:
            check_record(name, problem.full_record, options)
        except ConfigError as error:
            raise ConfigError(f"{problem.place or f'problem {problem.id}'}: {error}") from error
    return len(problems)
