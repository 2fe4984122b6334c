"""Every shipped kernel compiles for GPUs that are not here, without a spill and within their shared memory."""

import re

import pytest
from ahead_of_time import SHARED_LIMIT, TARGETS, compile_kernel
from oapl_kernels import epilogue_triton, scoring_triton, sequence_triton, weight_pack_triton

EPILOGUE = {"vocabulary": "i32", "stride": "i32"}
FLOATS = {"inverse_temperature": "fp32", "softcap": "fp32"}


def row_statistics(target, cap):
    pointers = {"logits": "*fp32", "target": "*i64", "out": "*fp32"}
    constants = {"BLOCK": epilogue_triton.BLOCK, "CAP": cap}
    signature = pointers | EPILOGUE | {"out_stride": "i32"} | FLOATS | dict.fromkeys(constants, "constexpr")
    divisible = [*pointers, *EPILOGUE]
    options = {"num_warps": epilogue_triton.WARPS}
    return compile_kernel(epilogue_triton.row_statistics, signature, constants, target, divisible, **options)


def row_gradient(target, cap, entropy, dtype):
    pointers = {"logits": "*fp32", "gradient": dtype, "target": "*i64", "stats": "*fp32"}
    pointers |= {"coefficient": "*fp32", "entropy_coefficient": "*fp32"}
    constants = {"BLOCK": epilogue_triton.BLOCK, "CAP": cap, "ENTROPY": entropy, "INTERPRETED": False}
    strides = EPILOGUE | {"gradient_stride": "i32"}
    signature = pointers | strides | {"stats_stride": "i32"} | FLOATS | dict.fromkeys(constants, "constexpr")
    options = {"num_warps": epilogue_triton.WARPS}
    return compile_kernel(epilogue_triton.row_gradient, signature, constants, target, [*pointers, *strides], **options)


def score_tile(target, dtype="*bf16", warps=None):
    pointers = {"hidden": dtype, "weight": dtype, "bias": "*fp32", "target": "*i64", "partial": "*fp32"}
    pointers |= {"chosen": "*fp32"}
    sizes = {"tokens": "i32", "depth": "i32", "vocabulary": "i32", "hidden_stride": "i32", "weight_stride": "i32"}
    constants = {name: getattr(scoring_triton, name) for name in ("TOKENS", "VOCABULARY", "DEPTH", "GROUP")}
    constants |= {"WHOLE_DEPTH": True, "BIAS": False, "CAP": False, "WIDEN": False}
    signature = pointers | sizes | FLOATS | dict.fromkeys(constants, "constexpr")
    stages = 2 if target.startswith("gfx") else 3
    options = {"num_warps": warps or scoring_triton.WARPS, "num_stages": stages}
    divisible = [*pointers, *sizes]
    return compile_kernel(scoring_triton.score_tile, signature, constants, target, divisible, **options)


def sum_sequence(target):
    pointers = {"values": "*fp32", "offsets": "*i64", "mask": "*u8", "sums": "*fp32"}
    constants = {"BLOCK": sequence_triton.BLOCK, "MASKED": True}
    signature = pointers | dict.fromkeys(constants, "constexpr")
    return compile_kernel(
        sequence_triton.sum_sequence, signature, constants, target, list(pointers), num_warps=sequence_triton.WARPS
    )


def pack_block(target, dtype="*bf16"):
    pointers = {"source": "*fp32", "payload": dtype, "digest": "*i32"}
    constants = {"BLOCK": weight_pack_triton.BLOCK, "INTERPRETED": False}
    signature = pointers | {"count": "i32", "words": "i32"} | dict.fromkeys(constants, "constexpr")
    options = {"num_warps": weight_pack_triton.WARPS}
    return compile_kernel(weight_pack_triton.pack_block, signature, constants, target, list(pointers), **options)


SHIPPED = {
    "weight-pack-bf16": pack_block,
    "weight-pack-fp32": lambda target: pack_block(target, "*fp32"),
    "score-bf16": score_tile,
    "score-fp16": lambda target: score_tile(target, "*fp16"),
    "sequence-sum": sum_sequence,
    "statistics": lambda target: row_statistics(target, False),
    "statistics-softcap": lambda target: row_statistics(target, True),
    "gradient-bf16": lambda target: row_gradient(target, False, False, "*bf16"),
    "gradient-fp32": lambda target: row_gradient(target, False, False, "*fp32"),
    "gradient-bf16-softcap-entropy": lambda target: row_gradient(target, True, True, "*bf16"),
}


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
def test_the_in_place_gradient_waits_between_reading_and_overwriting(target):
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
