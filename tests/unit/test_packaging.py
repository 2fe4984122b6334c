"""The base installation is torch, numpy and oapl_kernels; the engine comes with an extra."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

import pytest

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USE_KERNELS = """
import torch, oapl_kernels
hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
logprob = oapl_kernels.linear_logprob(hidden, weight, torch.arange(7))
logprob.sum().backward()
expected = torch.log_softmax(hidden @ weight.T, -1)[torch.arange(7), torch.arange(7)]
print(torch.allclose(logprob, expected, atol=1e-5))
"""


def names(requirements):
    """Names of requirements that hold here without an extra."""
    found = [re.match(r"[\w.-]+", r)[0] for r in requirements or () if "extra ==" not in r]
    return {name.lower().replace("_", "-") for name in found}


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory):
    """A folder with torch, numpy and what they require, as links; nothing else is installed there."""
    folder = tmp_path_factory.mktemp("torch_alone")
    wanted, done = ["torch", "numpy"], set()
    while wanted:
        name = wanted.pop()
        if name in done:
            continue
        done.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # for another platform
            continue
        wanted += names(package.requires)
        for file in package.files or ():
            top = file.parts[0]
            if top != ".." and not (folder / top).exists():
                (folder / top).symlink_to(package.locate_file(top))
    return folder


def run_alone(folder, code):
    """`code` in a Python that finds nothing but the folder and this checkout."""
    paths = [str(folder), str(ROOT / "kernels"), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path += {paths}\n{code}"], capture_output=True, text=True
    )


def test_the_base_requires_torch_and_numpy_only():
    assert names(PROJECT["dependencies"]) == {"torch", "numpy"}
    for extra in ("cpu", "cuda"):
        assert "oapl-engine[engine]" in PROJECT["optional-dependencies"][extra]


def test_the_kernels_run_with_torch_alone(torch_alone):
    done = run_alone(torch_alone, USE_KERNELS)
    assert done.stdout.strip() == "True", done.stderr


def test_oapl_without_the_engine_names_the_extras(torch_alone):
    done = run_alone(torch_alone, "from oapl_engine.entry import main\nsys.exit(main())")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "oapl-engine[cuda]" in line
    assert "oapl-engine[cpu]" in line
