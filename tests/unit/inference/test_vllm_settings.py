"""How vLLM is set up on CPU and on a GPU; a stand-in takes its place."""

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest

from oapl_engine.inference import vllm_settings
from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.vllm_settings import engine_arguments, start_llm


class FakeLLM:
    @classmethod
    def from_engine_args(cls, arguments, usage_context=None):
        llm = cls()
        llm.arguments, llm.context = arguments, usage_context
        return llm

    async def update_weight_version(self, version):
        self.version = version


@pytest.fixture
def start(monkeypatch):
    """start(on_cpu): start_llm on a fake vLLM of that platform."""
    monkeypatch.setattr(vllm_settings, "check_site_variables", lambda: None)
    contents = {
        "vllm": {"AsyncEngineArgs": dict},
        "vllm.usage.usage_lib": {"UsageContext": SimpleNamespace(ENGINE_CONTEXT="engine", LLM_CLASS="llm")},
        "vllm.v1.engine.async_llm": {"AsyncLLM": FakeLLM},
        "oapl_engine.inference.engine_core_thread": {"run_core_on_a_thread": lambda: None},
    }

    def start(on_cpu):
        platform = {"current_platform": SimpleNamespace(is_cpu=lambda: on_cpu)}
        for name, attributes in (contents | {"vllm.platforms": platform}).items():
            module = ModuleType(name)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, name, module)
        return asyncio.run(start_llm(EngineOptions("model", version=3)))

    return start


def test_graphs_and_compilation_are_off_on_cpu_only():
    """Weights are written in place, and graphs read them there; without graphs launches bound the decoding."""
    assert engine_arguments(EngineOptions("model"), on_cpu=True)["enforce_eager"] is True
    assert not {"enforce_eager", "compilation_config"} & engine_arguments(EngineOptions("model"), False).keys()


@pytest.mark.parametrize(("on_cpu", "samples", "context"), [(True, 256, "engine"), (False, None, "llm")])
def test_a_gpu_runs_as_many_samples_as_vllm_finds_best(start, on_cpu, samples, context):
    llm, found = start(on_cpu)
    assert found is on_cpu
    assert (llm.arguments.get("max_num_seqs"), llm.context, llm.version) == (samples, context, "3")


@pytest.mark.live
def test_vllms_batch_for_an_h100_is_the_larger_one(monkeypatch):
    from vllm import AsyncEngineArgs
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    h100 = SimpleNamespace(
        get_device_total_memory=lambda: 80 << 30,
        get_device_name=lambda: "NVIDIA H100",
        is_tpu=lambda: False,
        is_cpu=lambda: False,
    )
    monkeypatch.setattr(arg_utils, "current_platform", h100)
    tokens, samples = AsyncEngineArgs.get_batch_defaults(1)
    assert (samples[UsageContext.LLM_CLASS], tokens[UsageContext.LLM_CLASS]) == (1024, 16384)
    assert UsageContext.ENGINE_CONTEXT not in samples
