"""EngineOptions: what an engine process is started with."""

import msgspec


class EngineOptions(msgspec.Struct, frozen=True):
    """All values are plain: they travel to the engine process as JSON.

    model:            folder in Hugging Face layout
    dtype:            "float32" | "bfloat16"
    tensor_parallel:  devices (CPU: processes) that the engine is split over
    max_model_len:    tokens, prompt and response
    kv_cache_mb:      MiB of KV cache on CPU
    memory_share:     of a GPU's memory, which must be free when the engine starts
    seed:             of generation
    cores:            CPU core ids to stay on; empty: all
    incarnation:      counts restarts
    version:          policy version of the weights in `model`
    takes_updates:    whether weight updates are taken (weights.receiver); False: the weights are fixed
    worker_extension: class that answers for the weights in vLLM's worker; tests put a breakable one in its place
    """

    model: str
    dtype: str = "float32"
    tensor_parallel: int = 1
    max_model_len: int = 1024
    kv_cache_mb: int = 1024
    memory_share: float = 0.85
    seed: int = 0
    cores: tuple[int, ...] = ()
    incarnation: int = 0
    version: int = 0
    takes_updates: bool = True
    worker_extension: str = "oapl_engine.weights.receiver.vllm_plugin.WeightReport"


class ProcessOptions(msgspec.Struct, frozen=True):
    """EngineOptions and what ties the process to its owner.

    socket:  file descriptor of the engine's end of the owner's socket
    owner:   process id
    folder:  temporary folder of the engine, removed with it
    """

    engine: EngineOptions
    socket: int
    owner: int
    folder: str
