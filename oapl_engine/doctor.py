"""`oapl doctor --weights MODEL_DIR`: does a publish leave a live engine equal to one that loads the same checkpoint?"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from oapl_engine import config
from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.protocol import Sampling
from oapl_engine.rollout.session import EngineSession
from oapl_engine.samples import Prompt
from oapl_engine.trainer.loading import load_policy
from oapl_engine.trainer.policy import Policy, published_weights
from oapl_engine.weights.attest import WeightMismatchError
from oapl_engine.weights.control import EngineControl, Inspect
from oapl_engine.weights.publish import Publisher, publish_paused
from oapl_engine.weights.transports import make_buckets

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 24
NOISE = 0.02  # of a parameter's standard deviation


def check_weights(folder: str) -> str | None:
    """None if parameters and greedy output of both engines are identical, else the first difference.

    Prints the last line that docs/formats.md promises. Raises ConfigError for a folder that does not hold a model.
    """
    begin = time.monotonic()
    # on the host: it computes nothing, and the engine asks for most of a GPU
    policy = load_policy(config.ModelConfig(path=folder), config.TrainConfig(), torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="oapl-doctor-") as scratch:
        perturbed = Path(scratch, "perturbed")
        try:
            with _open_session(folder, Path(scratch)) as session:
                publish_perturbed(policy, session.control)
                live = EngineSnapshot.take(session)
        except WeightMismatchError as mismatch:
            return str(mismatch)
        policy.model.save_pretrained(perturbed, state_dict=dict(published_weights(policy)))
        policy.tokenizer.save_pretrained(perturbed)
        with _open_session(str(perturbed), Path(scratch)) as session:
            fresh = EngineSnapshot.take(session)
    difference = live.difference(fresh)
    if difference is None:
        count = sum(len(rank) for rank in live.checksums)
        print(f"weights: identical ({count} parameters, {time.monotonic() - begin:.0f} seconds)")
    return difference


@dataclass(frozen=True)
class EngineSnapshot:
    """What an engine holds and says.

    checksums:  of the parameters by name, one dict per rank of the engine
    responses:  token ids of greedy responses to fixed prompts
    """

    checksums: list[dict[str, int]]
    responses: list[list[int]]

    @classmethod
    def take(cls, session: EngineSession) -> Self:
        rng = np.random.default_rng(0)
        prompts = [Prompt(str(i), rng.integers(2, 40, PROMPT_TOKENS).astype(np.int32), "") for i in range(PROMPTS)]
        greedy = Sampling(temperature=0, max_new_tokens=NEW_TOKENS, ignore_stops=True)
        responses = [group[0].ids().tolist() for group in session.generate(prompts, 1, greedy)]
        return cls(session.control.update(Inspect()).reports, responses)

    def difference(self, fresh: Self) -> str | None:
        """The first difference to a freshly loaded engine, None if there is none."""
        for rank, (ours, theirs) in enumerate(zip(self.checksums, fresh.checksums, strict=True)):
            for name in ours | theirs:
                if ours.get(name) != theirs.get(name):
                    return f"{name} in rank {rank} of the live engine differs from a freshly loaded one"
        for number, (mine, other) in enumerate(zip(self.responses, fresh.responses, strict=True)):
            if mine != other:
                return f"greedy response {number} of the live engine differs from a freshly loaded one"
        return None


def publish_perturbed(policy: Policy, control: EngineControl) -> None:
    """Change every parameter of the policy a little, the same way each time, and publish it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter += noise * NOISE * (parameter.std() if parameter.ndim > 1 else 1)
    publisher = Publisher(
        lambda: published_weights(policy),
        control,
        dtype=torch.float32,
        make_buckets=lambda size: make_buckets("auto", size),
    )
    try:
        publish_paused(publisher, 1)
    finally:
        publisher.close()


def _open_session(folder: str, scratch: Path) -> EngineSession:
    options = EngineOptions(folder, max_model_len=PROMPT_TOKENS + NEW_TOKENS, kv_cache_mb=256)
    return EngineSession(options, scratch / "engine.log")
