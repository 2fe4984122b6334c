"""A trainer model and a live engine with breakable insides, joined by a publisher."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import torch

from oapl_engine.inference.client import BlockingControl
from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.protocol import Sampling
from oapl_engine.inference.supervisor import Engine
from oapl_engine.rollout.collector import Collector
from oapl_engine.samples import Prompt
from oapl_engine.weights.attest import TOLERANCE, ProbePrompts
from oapl_engine.weights.publish import Publisher, publish_paused
from tests.support.engines import phase_of
from tests.support.models import make_served_llama

ROOT = Path(__file__).parents[2]
VOCABULARY, NEW_TOKENS = 48, 12


class WatchedControl:
    """An EngineControl with hooks around every call.

    before, after:  name of a call ("pause", "score", …, or a request's type in lower case) to what is done with its
                    argument; where `before` returns something, that is sent instead
    """

    def __init__(self, control):
        self.control = control
        self.before, self.after = {}, {}

    def pause(self, mode):
        return self._watch("pause", self.control.pause, mode)

    def resume(self):
        return self._watch("resume", lambda _: self.control.resume(), None)

    def score(self, token_ids):
        return self._watch("score", self.control.score, token_ids)

    def update(self, request):
        return self._watch(phase_of(request), self.control.update, request)

    def kill(self, pid, phase, when):
        """SIGKILL a process "before" or "after" a phase; of the buckets, the third."""

        def kill(argument):
            if getattr(argument, "bucket", 2) == 2:
                os.kill(pid, signal.SIGKILL)

        getattr(self, when)[phase] = kill

    def let_go(self):
        """Without hooks again."""
        self.before, self.after = {}, {}

    def _watch(self, phase, call, argument):
        changed = self.before[phase](argument) if phase in self.before else None
        answer = call(argument if changed is None else changed)
        if phase in self.after:
            self.after[phase](argument)
        return answer


class Rig:
    """A trainer model, a live engine with breakable insides, and what lies between them.

    control:  WatchedControl of the engine; the publisher's
    mode:     of the pauses of publish()
    version:  that was published last
    """

    def __init__(self, folder, **more):
        self.fault = Path(folder, "fault")
        os.environ["OAPL_TEST_FAULT"] = str(self.fault)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.model = make_served_llama(folder, tied=True)
        extension = "tests.support.faults.Faulty"
        options = EngineOptions(str(folder), max_model_len=128, kv_cache_mb=64, worker_extension=extension, **more)
        self.engine = Engine(options, Path(folder, "engine.log"))
        self.collector = Collector(self.engine.client)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(2, VOCABULARY, 8).astype(np.int32) for _ in range(16)]
        token_ids = [rng.integers(2, VOCABULARY, 24).tolist() for _ in range(4)]
        self.control = WatchedControl(BlockingControl(self.collector.call, lambda: self.collector.client))
        self.publisher = Publisher(
            self.model.named_parameters,
            self.control,
            bucket_bytes=64 << 10,
            dtype=torch.float32,
            probes=ProbePrompts(token_ids, self.logprobs, TOLERANCE["float32"]),
        )
        self.mode = "drain"
        self.version = 0

    def publish(self):
        self.version += 1
        return publish_paused(self.publisher, self.version, self.mode)

    def counters(self):
        return self.collector.call(self.engine.client.counters())

    def restart(self):
        """A fresh engine process, which the next publish attaches to."""
        self.engine.restart()
        self.collector.attach(self.engine.client)
        self.publisher.engine_restarted()

    def change(self, scale=0.02):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += torch.randn_like(parameter) * scale * (parameter.std() if parameter.ndim > 1 else 0.1)

    @torch.no_grad()
    def logprobs(self, prompts):
        rows = [self.model(torch.tensor([p])).logits[0, :-1].log_softmax(-1) for p in prompts]
        return [r[range(len(p) - 1), p[1:]].numpy() for r, p in zip(rows, prompts, strict=True)]

    def greedy_of_trainer(self):
        return greedy(self.model, self.prompts)

    def greedy_of_engine(self):
        prompts = [Prompt(str(i), p, "test") for i, p in enumerate(self.prompts)]
        how = Sampling(temperature=0, max_new_tokens=NEW_TOKENS, ignore_stops=True)
        return [group[0].ids().tolist() for group in self.collector.generate_many(prompts, 1, how)]

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


@torch.no_grad()
def greedy(model, prompts):
    """NEW_TOKENS greedy token ids for each of several prompts of one length."""
    tokens = torch.tensor(np.stack(prompts), dtype=torch.int64)
    for _ in range(NEW_TOKENS):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens[:, -NEW_TOKENS:].tolist()
