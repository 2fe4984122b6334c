import pytest
import torch
from oapl_kernels.backend import extension

from tests.support.fresh_memory import nan_in_fresh_memory


@pytest.fixture(autouse=True)
def one_thread():
    """The shapes are tiny: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nan_in_memory():
    """A read before a write shows in the results."""
    with nan_in_fresh_memory():
        yield


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "portable"])
def instruction_set(request):
    """Every instruction set that this processor has, one after the other."""
    before = extension().instruction_set()
    try:
        extension().select_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    extension().select_instruction_set(before)
