"""What is loaded inside vLLM's processes: a plugin that takes weight updates in place (backend "oapl").

Needs torch, numpy and vLLM, nothing else of ours. The entry point `vllm.general_plugins` calls register() in every vLLM
process; an engine without weight_transfer_config={"backend": "oapl"} behaves as if it were not there.
"""

BACKEND = "oapl"


def register() -> None:
    """Make the backend known to vLLM. Idempotent."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(
        BACKEND, "oapl_engine.weights.receiver.engine", "InPlaceWeightTransferEngine"
    )
    from vllm.v1.engine.core import EngineCore

    from oapl_engine.weights.receiver.cpu_layers import keep_parameters_live
    from oapl_engine.weights.receiver.prefix_cache import cached_blocks

    keep_parameters_live()
    EngineCore.oapl_cached_blocks = cached_blocks
