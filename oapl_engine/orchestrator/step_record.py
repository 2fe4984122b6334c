"""What is kept of an optimizer step: in the journal how rollouts ended and what the weights are; a row of metrics."""

from typing import Any

import numpy as np
from oapl_kernels.weight_pack import checksum_all, combine_checksums

from oapl_engine.orchestrator.run import Run
from oapl_engine.rollout_log.ledger import COLUMNS, Ledger
from oapl_engine.samples import Group
from oapl_engine.scheduler import events as e
from oapl_engine.trainer.optimizer import learning_rate
from oapl_engine.trainer.policy import Policy
from oapl_engine.trainer.selection import StepSelection
from oapl_engine.trainer.step import StepResult


def record_dropped(run: Run, selection: StepSelection, result: StepResult | None) -> None:
    """Rollouts that the step left out end in the column of the rule that dropped them."""
    dropped = dict(selection.dropped)
    if result and not result.stepped:
        dropped |= dict.fromkeys(selection.keys, "nonfinite")
        run.display.say(f"step {run.step} skipped: {result.reason}")
    run.journal.dispose({key: f"dropped:{rule}" for key, rule in dropped.items()})


def record_done(
    run: Run, policy: Policy, command: e.Train, selection: StepSelection, result: StepResult | None
) -> None:
    """The step is done; a replayed one must give the weights that it gave before."""
    used = list(selection.keys) if result and result.stepped else []
    weights = [parameter.detach().contiguous() for parameter in policy.trainable().values()]
    found = combine_checksums(checksum_all(weights))
    before = run.journal.done(command.step, run.version, command.keys, used, found)
    if before != found:
        run.display.say(
            f"step {command.step}, replayed, gave weights {found} where it gave {before} before: another "
            "instruction set, number of threads or version of a library; the run continues with the new ones"
        )


def metrics_row(
    run: Run, ledger: Ledger, groups: list[Group], selection: StepSelection, result: StepResult | None
) -> dict[str, Any]:
    """The step's row of metrics.jsonl. Collective."""
    step_of_version = dict(run.journal.versions())
    lags = [run.step - 1 - step_of_version.get(group.version, 0) for group in groups]
    return {
        **selection.metrics,
        **(result.metrics if result else {}),
        **run.publish_metrics,
        **run.stopwatch.take(),
        **_token_metrics(run, ledger),
        "step": run.step,
        "policy_version": run.version,
        "off_policy/min": min(lags),
        "off_policy/mean": float(np.mean(lags)),
        "off_policy/max": max(lags),
        "optim/lr": learning_rate(run.recipe.optimizer, run.step - 1, run.recipe.schedule.steps),
    }


def _token_metrics(run: Run, ledger: Ledger) -> dict[str, Any]:
    """The ledger and what it adds up to, over all ranks. Collective."""
    own_tokens = run.journal.engine_tokens()
    own = [ledger.read(own_tokens), own_tokens, ledger.generated(), *ledger.invalid_counts()]
    ledgers, engine_tokens, generated, invalid, verified = zip(*run.ranks.gather(own), strict=True)
    columns = dict.fromkeys([*COLUMNS, *(column for ledger in ledgers for column in ledger)], 0)
    return {
        "ledger": {column: sum(ledger.get(column, 0) for ledger in ledgers) for column in columns},
        "tokens/engine": None if own_tokens is None else sum(engine_tokens),
        "tokens/generated": sum(generated),
        "reward/all/invalid": sum(invalid) / sum(verified) if sum(verified) else None,
    }
