"""`oapl doctor --weights MODEL_DIR`: does a publish leave a live engine equal to one that loads the same checkpoint?"""

import tempfile
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from oapl_engine import config
from oapl_engine.inference.protocol import Sampling
from oapl_engine.inference.supervisor import EngineOptions, start_engine
from oapl_engine.rollout.collector import Collector
from oapl_engine.samples import Prompt
from oapl_engine.trainer.policy import Policy, load_policy, published_weights
from oapl_engine.weights.attest import WeightMismatchError
from oapl_engine.weights.publish import Publisher
from oapl_engine.weights.transports import make_buckets

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 24
NOISE = 0.02  # of a parameter's standard deviation


def check_weights(folder: str) -> str | None:
    """None if parameters and greedy output of both engines are identical, else the first difference. Prints the last
    line that contracts.md promises. Raises ConfigError for a folder that holds no model."""
    begin = time.monotonic()
    policy = load_policy(config.ModelConfig(path=folder), config.TrainConfig())
    with tempfile.TemporaryDirectory(prefix="oapl-doctor-") as scratch:
        try:
            live = _Answers(folder, Path(scratch), lambda engine: _publish_perturbed(policy, engine))
        except WeightMismatchError as mismatch:
            return str(mismatch)
        policy.model.save_pretrained(f"{scratch}/perturbed", state_dict=dict(published_weights(policy)))
        policy.tokenizer.save_pretrained(f"{scratch}/perturbed")
        fresh = _Answers(f"{scratch}/perturbed", Path(scratch))
    difference = live.difference(fresh)
    if difference is None:
        count = sum(len(rank) for rank in live.checksums)
        print(f"weights: identical ({count} parameters, {time.monotonic() - begin:.0f} seconds)")
    return difference


class _Answers:
    """Checksums of the parameters, by rank and name, and greedy responses of an engine after `update`."""

    def __init__(self, folder: str, scratch: Path, update: Any = None) -> None:
        options = EngineOptions(folder, max_model_len=PROMPT_TOKENS + NEW_TOKENS, kv_cache_mb=256)
        with start_engine(options, scratch / "engine.log") as engine:
            collector = Collector(engine.client)
            if update:
                update(lambda phase, payload: collector.call(engine.client.control(phase, payload)))
            reply = collector.call(engine.client.transfer("inspect", {}))
            self.checksums: list[dict[str, int]] = reply["reports"]
            rng = np.random.default_rng(0)
            prompts = [Prompt(str(i), rng.integers(2, 40, PROMPT_TOKENS).astype(np.int32), "") for i in range(PROMPTS)]
            how = Sampling(temperature=0, max_new_tokens=NEW_TOKENS, ignore_stops=True)
            self.responses = [group[0].token_ids for group in collector.generate_many(prompts, 1, how)]
            collector.close()

    def difference(self, fresh: Self) -> str | None:
        for rank, (ours, theirs) in enumerate(zip(self.checksums, fresh.checksums, strict=True)):
            for name in ours | theirs:
                if ours.get(name) != theirs.get(name):
                    return f"{name} in rank {rank} of the live engine differs from a freshly loaded one"
        for number, (mine, other) in enumerate(zip(self.responses, fresh.responses, strict=True)):
            if mine != other:
                return f"greedy response {number} of the live engine differs from a freshly loaded one"
        return None


def _publish_perturbed(policy: Policy, control: Any) -> None:
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
        publisher.publish(1)
    finally:
        publisher.close()
