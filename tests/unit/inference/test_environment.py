"""A site's environment does not change what the engine assumes, and what the site may choose is passed on."""

import importlib.util
import os
import tomllib
from pathlib import Path

import pytest

from oapl_engine.distributed import own_gpus
from oapl_engine.errors import RunError
from oapl_engine.inference import environment
from oapl_engine.inference.environment import FLOAT32_ON_GPU, REMOVED, SET, check_site_variables, engine_environment
from oapl_engine.inference.options import EngineOptions
from oapl_engine.weights.receiver import ENTRY_POINT
from tests.conftest import ROOT

ONE = EngineOptions("model", cores=(3, 1, 2, 0))
TWO = EngineOptions("model", tensor_parallel=2, cores=(3, 1, 2, 0))


def started(site, options=ONE, gpus=0):
    return engine_environment(site, options, "/folder", gpus)


def test_the_entry_point_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ENTRY_POINT in project["entry-points"]["vllm.general_plugins"]


@pytest.mark.parametrize(
    ("theirs", "loaded"),
    [("", "oapl"), ("lora", "lora,oapl"), ("oapl", "oapl"), ("oapl,lora,", "lora,oapl")],
)
def test_our_plugin_is_loaded_beside_the_sites(theirs, loaded):
    assert started({"VLLM_PLUGINS": theirs})["VLLM_PLUGINS"] == loaded
    assert "VLLM_PLUGINS" not in started({}), "unset, vLLM loads all"


def test_what_would_break_the_engine_is_set_or_removed():
    site = dict.fromkeys([*REMOVED, *SET, "TMPDIR", "VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS"], "site's")
    found = started(site)
    assert not found.keys() & set(REMOVED)
    assert "site's" not in found.values()
    assert found["TMPDIR"] == "/folder"
    assert (found["VLLM_ENABLE_V1_MULTIPROCESSING"], found["OMP_NUM_THREADS"]) == ("0", "4")
    assert started(site, TWO)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


def test_what_the_site_may_choose_is_passed_on():
    names = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "NCCL_DEBUG", "VLLM_BATCH_INVARIANT", "http_proxy")
    site = dict.fromkeys(names, "site's")
    assert site.items() <= started(site).items()


@pytest.mark.parametrize(
    ("dtype", "gpus", "exact"), [("float32", 1, True), ("bfloat16", 1, False), ("float32", 0, False)]
)
def test_a_float32_engine_on_a_gpu_computes_in_float32(dtype, gpus, exact):
    """vLLM's attention leaves the precision of its products to Triton, whose default is TF32: too far from the
    trainer's log-probs for the probe prompts."""
    site = {"TRITON_F32_DEFAULT": "tf32", "NVIDIA_TF32_OVERRIDE": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    found = started(site, EngineOptions("model", dtype), gpus)
    assert {name: found[name] for name in site} == (FLOAT32_ON_GPU if exact else site)


def test_triton_reads_its_precision_from_the_environment():
    """A renamed variable would be set in vain."""
    knobs = Path(importlib.util.find_spec("triton").origin).with_name("knobs.py").read_text(encoding="utf-8")
    assert 'env_opt_str("TRITON_F32_DEFAULT")' in knobs


@pytest.mark.parametrize(
    ("listed", "gpus", "rank", "world", "own"),
    [
        (None, 8, None, 1, "0"),
        (None, 8, 3, 8, "3"),
        ("4,5,6,7", 4, 1, 4, "5"),
        ("GPU-a,GPU-b", 2, 1, 2, "GPU-b"),
        ("2,3", 2, 1, 1, "2"),
        ("", 0, 1, 2, ""),
    ],
)
def test_each_ranks_engine_has_a_gpu_of_its_own(listed, gpus, rank, world, own):
    """torchrun shows all GPUs to all ranks, and vLLM takes the first that it sees."""
    site = {"WORLD_SIZE": str(world)}
    site |= {"LOCAL_RANK": str(rank)} if rank is not None else {}
    site |= {"CUDA_VISIBLE_DEVICES": listed} if listed is not None else {}
    assert started(site, gpus=gpus)["CUDA_VISIBLE_DEVICES"] == own


def test_each_rank_of_a_split_engine_has_a_gpu_of_its_own():
    """The first of its engine's GPUs is the trainer's too: a publish must be visible to the engine."""
    site = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "7,6,5,4"}
    assert started(site, TWO, gpus=4)["CUDA_VISIBLE_DEVICES"] == "5,4"
    assert own_gpus(site, 4, 2).start == 2
    with pytest.raises(RunError, match="rank 1 of this machine needs GPUs 2 to 3, and 3 are visible"):
        started(site, TWO, gpus=3)


def test_nothing_is_compiled_on_cpu_only():
    assert started({})["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in started({}, gpus=1)


def test_modules_that_the_trainer_finds_are_found(monkeypatch):
    """A transport of the user's own beside the recipe (errors.find_modules_in) is imported in vLLM's processes too."""
    monkeypatch.setattr(environment.sys, "path", ["/opt/site", "", "/home/me/recipes"])
    assert started({})["PYTHONPATH"].split(":") == ["/opt/site", os.getcwd(), "/home/me/recipes"]


@pytest.mark.parametrize(
    ("theirs", "bound"),
    [(None, "0,2|1,3"), ("0-31", "0,2|1,3"), ("0|1|2", "0,2|1,3"), ("0-1|2-3", "0-1|2-3"), ("nobind", "nobind")],
)
def test_every_rank_has_cores(theirs, bound):
    """vLLM refuses a binding for another number of ranks."""
    site = {} if theirs is None else {"VLLM_CPU_OMP_THREADS_BIND": theirs}
    assert started(site, TWO)["VLLM_CPU_OMP_THREADS_BIND"] == bound


def test_a_library_that_is_preloaded_stays(monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    assert started({"LD_PRELOAD": "/opt/libtcmalloc.so"})["LD_PRELOAD"] == "/opt/libtcmalloc.so"


@pytest.mark.live
def test_a_value_that_vllm_cannot_read_is_named(monkeypatch):
    check_site_variables()
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "many")
    with pytest.raises(RunError, match="VLLM_CPU_NUM_OF_RESERVED_CPU = 'many' in the environment"):
        check_site_variables()
