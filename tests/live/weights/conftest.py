"""Live engines that publishing tests may break."""

import os

import pytest

from tests.support.rig import Rig


@pytest.fixture(scope="module")
def make_rig(tmp_path_factory):
    """Rig(**engine options); closed after the module."""
    variables = {name: os.environ.get(name) for name in ("OAPL_TEST_FAULT", "PYTHONPATH")}
    rigs = []

    def make(**more):
        rigs.append(Rig(tmp_path_factory.mktemp("micro"), **more))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
