"""A trainer model and a live engine with breakable insides, joined by a publisher."""

import asyncio
import os
from pathlib import Path

import numpy as np
import torch

from oapl_engine.inference.protocol import Sampling
from oapl_engine.inference.supervisor import EngineOptions, start_engine
from oapl_engine.rollout.collector import Collector
from oapl_engine.samples import Prompt
from oapl_engine.weights.attest import TOLERANCE, Golden
from oapl_engine.weights.publish import Publisher

VOCABULARY, NEW_TOKENS = 48, 12


class Rig:
    """A trainer model, a live engine with breakable insides, and what lies between them."""

    def __init__(self, folder, **more):
        self.fault = Path(folder, "fault")
        os.environ["OAPL_TEST_FAULT"] = str(self.fault)
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)
        self.model = make_served_llama(folder, tied=True)
        options = EngineOptions(
            str(folder), max_model_len=128, kv_cache_mb=64, threads=1, worker_extension="faults.Faulty", **more
        )
        self.engine = start_engine(options, Path(folder, "engine.log"))
        self.collector = Collector(self.engine.client, None, None)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(2, VOCABULARY, 8).astype(np.int32) for _ in range(16)]
        golden = Golden(
            [rng.integers(2, VOCABULARY, 24).tolist() for _ in range(4)], self.logprobs, TOLERANCE["float32"]
        )
        self.publisher = Publisher(self.model.named_parameters, self.control, 64 << 10, torch.float32, golden)
        self.corrupt = None
        self.version = 0

    def control(self, phase, payload):
        if phase == "bucket" and self.corrupt:
            self.corrupt(payload)
        return self.collector.call(self.engine.client.control(phase, payload))

    def publish(self):
        self.version += 1
        return self.publisher.publish(self.version)

    def change(self, scale=0.02):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += torch.randn_like(parameter) * scale * (parameter.std() if parameter.ndim > 1 else 0.1)

    @torch.no_grad()
    def logprobs(self, prompts):
        rows = [self.model(torch.tensor([p])).logits[0, :-1].log_softmax(-1) for p in prompts]
        return [r[range(len(p) - 1), p[1:]].numpy() for r, p in zip(rows, prompts, strict=True)]

    @torch.no_grad()
    def greedy_of_trainer(self):
        tokens = torch.tensor(np.stack(self.prompts), dtype=torch.int64)
        for _ in range(NEW_TOKENS):
            tokens = torch.cat([tokens, self.model(tokens).logits[:, -1:].argmax(-1)], 1)
        return tokens[:, -NEW_TOKENS:].tolist()

    def greedy_of_engine(self):
        prompts = [Prompt(str(i), p, "test") for i, p in enumerate(self.prompts)]
        how = Sampling(temperature=0, max_new_tokens=NEW_TOKENS, ignore_stops=True)
        samples = self.collector.generate_many(prompts, 1, how)
        return [np.frombuffer(s[0].token_ids, "<i4").tolist() for s in samples]

    def served_within(self, seconds):
        """Whether the engine answers a prompt."""

        async def one():
            async for _ in self.engine.client.generate([3, 4], 1, Sampling(max_new_tokens=1)):
                pass

        async def limited():
            try:
                await asyncio.wait_for(one(), seconds)
            except TimeoutError:
                return False
            return True

        return self.collector.call(limited())

    def close(self):
        self.collector.close()
        self.engine.stop()
        self.publisher.close()
