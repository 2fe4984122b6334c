"""objective.behavior = "recomputed": behaviour log-probs by the trainer, while its policy is still the engine's."""

import numpy as np

from oapl_engine.errors import RunError
from oapl_engine.orchestrator.run import Run
from oapl_engine.trainer.policy import Policy
from oapl_engine.trainer.score import LogProbs, score


def recompute_behavior(run: Run, policy: Policy) -> LogProbs:
    """Log-probs of all unused rollouts under π_vllm, kept on disk: after the first step π is no longer π_vllm.

    Raises RunError where they were not kept and it is too late to compute them.
    """
    published = max((step for _, step in run.journal.versions()), default=0)
    path = run.directory / "behavior" / f"step_{published:06d}{run.ranks.suffix}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    if run.step != published:
        raise RunError(
            f"{path} is missing, and π at step {run.step} is not the policy that generated the rollouts (step "
            f'{published}): start in a new run.dir, or with objective.behavior = "engine"'
        )
    used = run.journal.uses()
    logged = map(run.log.group, run.log.group_keys())
    groups = [group for group in logged if not any(rollout.key in used for rollout in group.rollouts)]
    run.display.show_phase("rescore", f"{len(groups)} groups")
    logprobs = score(
        policy,
        groups,
        temperature=run.recipe.sampling.temperature,
        token_budget=run.recipe.train.token_budget,
        share_prompts=run.recipe.train.share_prompts,
    )
    path.parent.mkdir(exist_ok=True)
    np.savez(path.with_suffix(".tmp.npz"), **logprobs)  # type: ignore[arg-type]
    path.with_suffix(".tmp.npz").rename(path)
    return logprobs
