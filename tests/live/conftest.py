"""A random micro Llama as a checkpoint."""

import pytest


@pytest.fixture(scope="session")
def micro_checkpoint(tmp_path_factory):
    """Folder of a Llama that vLLM serves, untied head (tests.support.models.make_served_llama)."""
    from tests.support.models import make_served_llama

    folder = tmp_path_factory.mktemp("micro")
    make_served_llama(folder, tied=False)
    return folder
