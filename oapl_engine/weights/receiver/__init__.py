"""What is loaded inside vLLM's processes: a plugin that takes weight updates in place (backend "oapl").

Needs torch, numpy, msgspec (which vLLM needs too) and vLLM, nothing else of ours but oapl_kernels. The entry point
`vllm.general_plugins` calls register() in every vLLM process; an engine without weight_transfer_config={"backend":
"oapl"} behaves as if it were not there.
"""

BACKEND = "oapl"
ENTRY_POINT = "oapl"  # of the plugin (pyproject.toml), which a VLLM_PLUGINS must name
PLUGIN = "oapl_engine.weights.receiver.vllm_plugin"


def register() -> None:
    """Make the backend known to vLLM. Idempotent."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(BACKEND, PLUGIN, "InPlaceWeightTransferEngine")
    from vllm.v1.engine.core import EngineCore

    from oapl_engine.weights.receiver.cpu_layers import keep_parameters_live

    keep_parameters_live()
    EngineCore.oapl_cached_blocks = count_cached_blocks


def count_cached_blocks(core: object) -> int:
    """How many KV blocks of earlier requests a later one would find. core: vLLM's EngineCore, which register() gives
    this function as the utility oapl_cached_blocks (EngineCoreClient.call_utility_async)."""
    pool = core.scheduler.kv_cache_manager.block_pool  # type: ignore[attr-defined]
    return len(pool.cached_block_hash_to_block)
