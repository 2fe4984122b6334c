"""The environment of the engine process: what a site sets for other work must not change what the engine assumes.

What is not named here stays the site's: devices (VLLM_TARGET_DEVICE; the rank's own of CUDA_VISIBLE_DEVICES), caches
(HF_HOME, VLLM_CACHE_ROOT), networks (NCCL_*, GLOO_*), kernels (VLLM_BATCH_INVARIANT, VLLM_KV_CACHE_LAYOUT,
VLLM_ROCM_*), and limits. VLLM_SERVER_DEV_MODE and other variables of vLLM's server are not read: there is no server.
"""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from oapl_engine.distributed import own_gpus
from oapl_engine.errors import RunError
from oapl_engine.inference.options import EngineOptions
from oapl_engine.weights.receiver import ENTRY_POINT

SPINS = "1000"
SET = {
    "DO_NOT_TRACK": "1",  # nothing is reported to anyone
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the trainer has loaded the model: it is on this disk
    "VLLM_HOST_IP": "127.0.0.1",  # nothing listens beyond this host
    "VLLM_CONFIGURE_LOGGING": "1",  # an error shows the end of the log: what matters must be there
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads, and a fork of them may hang
    "TOKENIZERS_PARALLELISM": "false",  # the engine gets token ids
    "PYTHONUTF8": "1",  # files of models are UTF-8, whatever the terminal is
}
FLOAT32_ON_GPU = {  # what reads these computes float32 products in TF32 otherwise, or where a site says so
    "TRITON_F32_DEFAULT": "ieee",  # vLLM's only attention in float32 is Triton's, which leaves the choice to it
    "NVIDIA_TF32_OVERRIDE": "0",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",
}
REMOVED = (
    "PYTHONOPTIMIZE",  # vLLM and transformers read docstrings and rely on asserts
    "PYTHONWARNINGS",  # with "error" their imports fail
    "VLLM_ALLOW_INSECURE_SERIALIZATION",  # no pickle between processes
    "VLLM_CPU_KVCACHE_SPACE",  # overrides rollout.kv_cache_mb
    "VLLM_DP_MASTER_IP",  # those of a data parallel server: here each engine is one replica
    "VLLM_DP_MASTER_PORT",
    "VLLM_DP_RANK",
    "VLLM_DP_RANK_LOCAL",
    "VLLM_DP_SIZE",
    "VLLM_ENABLE_STARTUP_PLAN",  # remembers another run's memory: it is rollout.memory_share's
    "VLLM_FLOAT32_MATMUL_PRECISION",  # precision is rollout.engine_dtype's; log-probs must be the trainer's
    "VLLM_LOGGING_CONFIG_PATH",  # would send the log elsewhere
    "VLLM_LOGGING_STREAM",
    "VLLM_LOOPBACK_IP",  # vLLM finds 127.0.0.1 or ::1
    "VLLM_MODEL_REDIRECT_PATH",  # the weights are those of the folder that was asked for
    "VLLM_MOE_ROUTING_SIMULATION_STRATEGY",  # routes tokens at random
    "VLLM_PORT",  # engines of several ranks would race for it, and Kubernetes puts an address there
    "VLLM_PP_LAYER_PARTITION",  # refused where there is one pipeline stage
    "VLLM_REPLICATE_EMBED",  # refused for models with tied embeddings
    "VLLM_RPC_BASE_PATH",  # sockets are in our folder, and gone with it
    "VLLM_USE_MODELSCOPE",  # another hub, whose package may be missing
    "VLLM_USE_V2_MODEL_RUNNER",  # weight updates are made for the runner that vLLM chooses itself
)


def engine_environment(site: Mapping[str, str], options: EngineOptions, folder: str, gpus: int) -> dict[str, str]:
    """What the engine process starts with where the site's environment is `site`.

    folder:  for its temporary files
    gpus:    that this process sees; 0: the engine runs on CPU

    Raises RunError where this rank's GPUs are not among them.
    """
    one_process = options.tensor_parallel == 1
    environment = {name: value for name, value in site.items() if name not in REMOVED} | SET
    environment |= {"TMPDIR": folder, "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if one_process else "1"}
    # kept from one engine to the next; by default it is in TMPDIR, which lives as long as the start
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
    # a transport of the user's own lies beside the recipe, or where the trainer was started
    environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    if "VLLM_PLUGINS" in site:  # a list of those that are loaded: ours is needed too
        theirs = [name for name in site["VLLM_PLUGINS"].split(",") if name not in ("", ENTRY_POINT)]
        environment["VLLM_PLUGINS"] = ",".join([*theirs, ENTRY_POINT])
    if not gpus:
        environment["TORCHDYNAMO_DISABLE"] = "1"  # else vLLM's sampler compiles C++ at the first request (16 s)
    else:
        environment["CUDA_VISIBLE_DEVICES"] = _devices(site, gpus, options.tensor_parallel)
        if options.dtype == "float32":
            environment |= FLOAT32_ON_GPU
    cores = sorted(options.cores or os.sched_getaffinity(0))
    if not one_process:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = _binding(site, cores, options.tensor_parallel)
    return environment | _openmp(site, len(cores))


def _devices(site: Mapping[str, str], gpus: int, ranks: int) -> str:
    """This rank's own entries of the site's list: vLLM takes the first that it sees, and torchrun shows all to all."""
    listed = site.get("CUDA_VISIBLE_DEVICES")
    visible = [str(number) for number in range(gpus)] if listed is None else listed.split(",")
    own = own_gpus(site, min(gpus, len(visible)), ranks)
    return ",".join(visible[own.start : own.stop])


def _binding(site: Mapping[str, str], cores: list[int], ranks: int) -> str:
    """CPU cores of each rank; the site's where they are for as many ranks, which vLLM insists on."""
    theirs = site.get("VLLM_CPU_OMP_THREADS_BIND", "")
    if theirs in ("auto", "nobind") or len(theirs.split("|")) == ranks:
        return theirs
    return "|".join(",".join(map(str, cores[rank::ranks])) for rank in range(ranks))


def _openmp(site: Mapping[str, str], threads: int) -> dict[str, str]:
    """PyTorch's own OpenMP library first: without it vLLM's kernels and torch use two pools, and one core. Short spins:
    threads that spin at barriers made the engine 10 to 40 times slower on cores that it had to share."""
    environment = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": site.get("GOMP_SPINCOUNT", SPINS)}
    loaded = site.get("LD_PRELOAD", "")
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin and not any(name in loaded for name in ("libgomp", "libiomp", "libomp")):
        for library in sorted(Path(torch.origin).parent.glob("lib/libgomp*.so*"))[:1]:
            environment["LD_PRELOAD"] = f"{loaded}:{library}".lstrip(":")
    return environment


def check_site_variables() -> None:
    """Raises RunError for a variable whose value vLLM cannot read; in the engine process, as vLLM knows its names."""
    from vllm import envs

    for name in sorted(envs.environment_variables.keys() & os.environ.keys()):
        try:
            envs.environment_variables[name]()
        except (ValueError, OSError) as error:
            found = f"{name} = {os.environ[name]!r} in the environment"
            raise RunError(f"{found} cannot be read by vLLM: {error}; unset it, or correct it") from error
