"""A run of a tiny model on real databases, without an engine."""

from contextlib import ExitStack

import pytest

from oapl_engine.config import load_recipe
from oapl_engine.distributed import ALONE
from oapl_engine.orchestrator.run import open_run, save_recipe
from tests.conftest import ROOT


@pytest.fixture
def make_recipe(tmp_path, model_folder):
    """make_recipe("--section.field", value, …): the micro recipe on a random Llama; its run directory: tmp_path/run."""
    folder = model_folder("llama")

    def make(*overrides):
        words = ["--model.path", folder, "--run.dir", tmp_path / "run", "--train.token_budget", 512, *overrides]
        return load_recipe(ROOT / "recipes" / "micro.toml", [str(word) for word in words])

    return make


@pytest.fixture
def make_run(make_recipe):
    """make_run(overrides, ranks): a Run in which all input has proved good; closed after the test."""
    with ExitStack() as stack:

        def make(*overrides, ranks=ALONE):
            run = stack.enter_context(open_run(make_recipe(*overrides), ranks))
            save_recipe(run)
            return run

        yield make
