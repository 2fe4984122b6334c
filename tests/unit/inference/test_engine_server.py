"""EngineServer over a stand-in for vLLM: what a live engine shows only once in hundreds of publishes."""

import asyncio
from types import SimpleNamespace

import msgspec

from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.protocol import Sampling
from oapl_engine.inference.server import EngineServer


class LateLLM:
    """pause_generation returns when the work is done, a moment before the outputs arrive."""

    def __init__(self):
        self.done = asyncio.Event()

    async def generate(self, prompt, params, name):
        await self.done.wait()
        for _ in range(3):
            await asyncio.sleep(0)
        part = SimpleNamespace(
            token_ids=[5], logprobs=SimpleNamespace(logprobs=[-1.0]), weight_versions=None, finish_reason="stop"
        )
        yield SimpleNamespace(outputs=[part], num_cached_tokens=0)

    async def pause_generation(self, mode, clear_cache):
        self.done.set()

    async def resume_generation(self):
        pass


def test_a_pause_ends_when_the_last_output_has_arrived():
    async def scene():
        server, samples = EngineServer(LateLLM(), EngineOptions(""), on_cpu=True), []
        server._params = lambda how, done: None
        how = msgspec.to_builtins(Sampling(max_new_tokens=4))
        running = asyncio.create_task(server.generate([3, 4], 2, how, samples.append))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert server.counted.samples_running == 2
        await server.pause("drain")
        assert server.counted.samples_running == 0  # or the update that follows is refused
        await running
        assert len(samples) == 2

    asyncio.run(scene())
