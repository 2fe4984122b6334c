"""How vLLM is set up: engine arguments, and the running AsyncLLM.

vLLM is imported here and below only, in the engine's child process.
"""

from typing import Any

from oapl_engine.inference.environment import check_site_variables
from oapl_engine.inference.options import EngineOptions
from oapl_engine.weights.receiver import BACKEND

CPU_SAMPLES = 256  # that run at the same time
CPU_BLOCK_SIZE = 32  # tokens per KV block: small blocks let short prompts be shared between samples


async def start_llm(options: EngineOptions) -> tuple[Any, bool]:
    """A running AsyncLLM, and whether it runs on CPU. RunError where vLLM cannot read a variable of the environment."""
    check_site_variables()
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from oapl_engine.inference.engine_core_thread import run_core_on_a_thread

    if options.tensor_parallel == 1:
        run_core_on_a_thread()
    on_cpu = current_platform.is_cpu()
    # On a GPU vLLM's own batch for work without a deadline, which depends on the card (H100: 1,024 samples and 16,384
    # tokens a step); without a context it takes 128 and 2,048 on any.
    context = UsageContext.ENGINE_CONTEXT if on_cpu else UsageContext.LLM_CLASS
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(options, on_cpu)), usage_context=context)
    await llm.update_weight_version(str(options.version))
    return llm, on_cpu


def engine_arguments(options: EngineOptions, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs. On CPU eager, because there are no CUDA graphs and compiling takes long."""
    device: dict[str, Any]
    if on_cpu:
        device = {
            "kv_cache_memory_bytes": options.kv_cache_mb << 20,
            "block_size": CPU_BLOCK_SIZE,
            "enforce_eager": True,
            "max_num_seqs": CPU_SAMPLES,
        }
    else:
        device = {"gpu_memory_utilization": options.memory_share, "enable_sleep_mode": True}
    updates: dict[str, Any] = {}
    if options.takes_updates:
        updates = {
            "weight_transfer_config": {"backend": BACKEND},
            "worker_extension_cls": options.worker_extension,
        }
    return {
        "model": options.model,
        "dtype": options.dtype,
        "tensor_parallel_size": options.tensor_parallel,
        "max_model_len": options.max_model_len,
        "seed": options.seed,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "generation_config": "auto",
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        **device,
        **updates,
    }
