"""What a simulated run costs, and what it would be like."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Machine:
    """What a run costs, in seconds.

    engines:              vLLM engines
    slots:                sequences that one engine runs at the same time
    token_seconds:        of one sequence
    costs:                command name to seconds in which the driver is busy with it
    crowding:             added to token_seconds for every sequence on the engine
    train_token_seconds:  added to an optimizer step for every token in it
    group_size:           sequences per group
    tokens_mean:          mean response length; lengths are lognormal
    tokens_sigma:         standard deviation of ln length
    tokens_most:          lengths are cut here
    prompt_share:         share of that variance that samples of one prompt have in common
    verify_seconds:       mean, exponential
    failure_seconds:      mean time between failures of one engine
    restart_seconds:      until a failed engine is back
    """

    engines: int
    slots: int
    token_seconds: float
    costs: Mapping[str, float]
    crowding: float = 0.0
    train_token_seconds: float = 0.0
    group_size: int = 8
    tokens_mean: float = 100.0
    tokens_sigma: float = 0.0
    tokens_most: int = 1 << 20
    prompt_share: float = 0.5
    verify_seconds: float = 0.0
    failure_seconds: float = float("inf")
    restart_seconds: float = 0.0


@dataclass
class Outcome:
    """What a run would be like. Shares are of the time between the first and the last quarter of its steps.

    seconds:            until its last step
    training:           share spent in optimizer steps
    generation:         share of the engines' slots in use
    tokens_per_second:  trained
    cleared:            share of the finished groups that left the window untrained
    failures:           of engines
    lags:               lag in optimizer steps to the number of groups trained at it
    """

    seconds: float
    training: float
    generation: float
    tokens_per_second: float
    cleared: float
    failures: int
    lags: dict[int, int]

    def lag_percentile(self, share: float) -> int:
        """The lag that `share` (0…1) of the trained groups does not exceed."""
        lags = sorted(self.lags)
        counts = np.cumsum([self.lags[lag] for lag in lags])
        return lags[int(np.searchsorted(counts, share * counts[-1]))]
