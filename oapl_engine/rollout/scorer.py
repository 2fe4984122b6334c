"""From the token ids of a response to a verdict: decode, then verify in a process that can be killed."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oapl_engine.config import RewardConfig
from oapl_engine.rewards import Verdict, VerifierPool
from oapl_engine.rewards.verdict import check_verifier
from oapl_engine.samples import Prompt

TokenIds = Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True)
class Scorer:
    """A verifier by name, its options, the processes that run it, and the tokenizer of the policy.

    timed: makes a context that measures the seconds of one verdict.
    """

    pool: VerifierPool
    name: str
    options: dict[str, Any]
    tokenizer: Any
    timed: Callable[[], AbstractContextManager[Any]] = nullcontext

    async def verify(self, prompt: Prompt, response: TokenIds) -> Verdict:
        """The verdict on one response [R]."""
        text = self._text(response)
        with self.timed():  # next to generation: these seconds overlap
            return await self.pool.verify(self.name, text, prompt.record, self.options)

    def verify_many(self, pairs: Sequence[tuple[Prompt, TokenIds]]) -> list[Verdict]:
        """Verdicts on (prompt, response) pairs, in their order."""
        items = [(self._text(response), prompt.record) for prompt, response in pairs]
        return self.pool.verify_many(self.name, items, self.options)

    def close(self) -> None:
        """End the verifier processes."""
        self.pool.close()

    def _text(self, response: TokenIds) -> str:
        text: str = self.tokenizer.decode(np.asarray(response).tolist(), skip_special_tokens=True)
        return text


def open_scorer(
    reward: RewardConfig,
    verifier: str,
    options: dict[str, Any],
    tokenizer: Any,
    timed: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Scorer:
    """The scorer of a recipe's [reward]; verifier and options are the data source's, used where [reward] names none.

    Raises ConfigError for an unknown verifier or option; close() the result.
    """
    name, merged = reward.name or verifier, options | reward.options
    check_verifier(name, merged)
    pool = VerifierPool(reward.workers, reward.timeout_seconds, reward.memory_mb)
    return Scorer(pool, name, merged, tokenizer, timed)
