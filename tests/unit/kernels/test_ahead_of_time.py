"""Every shipped kernel compiles for GPUs that are not here, without a spill and within their shared memory."""

import re

import pytest
from oapl_kernels import epilogue_triton

from benchmarks._ahead_of_time import SHARED_LIMIT, SHIPPED, TARGETS, row_gradient, row_statistics, score_tile


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SHIPPED)
def test_no_spills_and_shared_memory_within_the_limit(name, target, figure):
    compiled = SHIPPED[name](target)
    figure(f"{name} {target}", {"registers": compiled.registers, "shared": compiled.shared, "spills": compiled.spills})
    assert compiled.spills == 0
    assert compiled.shared <= SHARED_LIMIT[target]


def test_the_spill_count_can_be_other_than_zero(monkeypatch):
    """The same block on one warp does not fit its registers."""
    monkeypatch.setattr(epilogue_triton, "WARPS", 1)
    assert row_statistics("cuda90", False).spills > 0


@pytest.mark.parametrize("target", ["cuda80", "cuda90", "cuda100"])
def test_in_place_gradient_waits_before_overwriting(target):
    order = re.findall(r"\b(LDG\.E\.128|BAR\.SYNC|STG\.E\.128)", row_gradient(target, False, False, "*bf16").assembly)
    reads = [index for index, name in enumerate(order) if name == "LDG.E.128"]
    writes = [index for index, name in enumerate(order) if name == "STG.E.128"]
    assert max(reads) < order.index("BAR.SYNC") < min(writes)


@pytest.mark.parametrize(
    ("target", "instructions"),
    [
        ("cuda80", ["HMMA", "LDGSTS"]),
        ("cuda90", ["HGMMA", "LDGSTS"]),
        ("cuda100", ["UTCHMMA", "LDGSTS"]),
        ("gfx942", ["v_mfma"]),
    ],
)
def test_scoring_uses_the_matrix_units_and_asynchronous_loads(target, instructions, figure):
    compiled = score_tile(target)
    counts = {name: compiled.count(name) for name in instructions}
    figure(f"score {target}", counts)
    assert all(counts.values()), counts
