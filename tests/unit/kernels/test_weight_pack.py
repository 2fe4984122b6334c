import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oapl_kernels import weight_pack
from oapl_kernels.weight_pack import checksum_all, combine_checksums, copy_and_count_changes, pack, pack_all


def formula(data: bytes) -> int:
    """contracts.md, word by word."""
    data += bytes(-len(data) % 4)

    def mix(h):
        h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
        return h ^ h >> 16

    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    sums = [sum(mix(w ^ mix((i + seed) & 0xFFFFFFFF)) for i, w in enumerate(words)) for seed in weight_pack.SEEDS]
    return sums[0] & 0xFFFFFFFF | (sums[1] & 0xFFFFFFFF) << 32


def checksum(payload):
    return checksum_all([payload])[0]


def checksum_in(digest):
    low, high, _ = (digest.long() & 0xFFFFFFFF).tolist()
    return low | high << 32


@pytest.fixture(params=["C++", "numpy"])
def implementation(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(weight_pack, "extension", lambda: None)
    elif weight_pack.extension() is None:
        pytest.skip("oapl_kernels._cpu is not built (python setup.py build_ext --inplace)")


@pytest.mark.parametrize("dtype", weight_pack.CASTS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 1000, 70001])
def test_checksum_is_the_formula(implementation, count, dtype):
    source = torch.randn(count)
    payload = torch.empty(count, dtype=dtype)
    found = checksum_in(pack(source, payload))
    assert torch.equal(payload, source.to(dtype))
    assert found == checksum(payload) == checksum(payload.view(torch.uint8))
    if count <= 1000:
        assert found == formula(payload.view(torch.uint8).numpy().tobytes())


def test_a_cast_is_torchs_for_every_kind_of_value(implementation):
    ties = torch.arange(0x3F800000, 0x3F800000 + 0x60000, 0x2000, dtype=torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3.38e38, 3.4e38, torch.inf, -torch.inf, torch.nan])
    source = torch.cat([ties, -ties, special, torch.randn(40_000)])
    payload = torch.empty(len(source), dtype=torch.bfloat16)
    nonfinite = int(pack(source, payload)[2])
    expected, number = source.bfloat16(), ~source.isnan()  # torch has two bit patterns for NaN itself
    assert torch.equal(payload.view(torch.int16)[number], expected.view(torch.int16)[number])
    assert torch.equal(payload.isnan(), expected.isnan())
    assert nonfinite == 4  # 3.4e38 rounds to infinity


def test_many_at_once_are_as_one_after_another(implementation):
    sizes = [5, 70001, 0, 1, 16384, 16385, 300]
    sources = [torch.randn(size).to(torch.bfloat16 if size == 300 else torch.float32) for size in sizes]
    places = [torch.empty(size, dtype=torch.bfloat16) for size in sizes]
    together = pack_all(sources, places)
    for source, place, digest in zip(sources, places, together, strict=True):
        other = torch.empty_like(place)
        assert torch.equal(pack(source, other), digest)
        assert torch.equal(place, source.bfloat16())
    assert checksum_all(places) == [checksum_in(digest) for digest in together] == [checksum(x) for x in places]
    assert checksum_all([]) == []
    assert pack_all([], []).shape == (0, 3)
    with pytest.raises(ValueError, match=r"source has shape \[5\]; allowed: \[6\]"):
        pack_all([sources[0]], [torch.empty(6)])
    with pytest.raises(ValueError, match="allowed: contiguous, starting at a multiple of 16 bytes"):
        pack_all([sources[0]], [torch.empty(5, 2)[:, 0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int16], ids=str)
def test_copy_counts_what_changed(implementation, dtype):
    befores = [torch.randint(0, 99, (count,)).to(dtype) for count in (0, 1, 7, 16385, 70001)]
    afters = [before.clone() for before in befores]
    touched = 0
    for after in afters:
        chosen = torch.rand(len(after)) < 0.3
        after[chosen] += 1
        touched += int(chosen.sum())
    wholes = [torch.cat([before, before]) for before in befores]
    places = [whole[: len(after)] for whole, after in zip(wholes, afters, strict=True)]
    assert copy_and_count_changes(afters, places) == touched
    assert all(torch.equal(w, torch.cat([a, b])) for w, a, b in zip(wholes, afters, befores, strict=True))
    assert copy_and_count_changes(afters, places) == 0
    if dtype.is_floating_point:
        zero, minus = torch.zeros(1, dtype=dtype), -torch.zeros(1, dtype=dtype)
        assert copy_and_count_changes([minus], [zero]) == 1  # equal as values, not as bits


def test_combined_checksums_wrap_each_half_and_forget_the_order():
    assert combine_checksums([0xFFFFFFFF_00000001, 0x00000002_FFFFFFFF]) == combine_checksums(
        [0x00000002_FFFFFFFF, 0xFFFFFFFF_00000001]
    )
    assert combine_checksums([0xFFFFFFFF_00000001, 0x00000002_FFFFFFFF]) == "0000000100000000"
    assert combine_checksums([0x1, 0x2]) != combine_checksums([0x1, 0x3])


def test_copy_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="allowed: contiguous tensors of 2 or 4 bytes"):
        copy_and_count_changes([torch.zeros(4, dtype=torch.int64)], [torch.zeros(4, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"destination has shape \[3\]; allowed: \[4\]"):
        copy_and_count_changes([torch.zeros(4)], [torch.zeros(3)])


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40), data=st.data())
def test_any_changed_or_moved_value_changes_the_checksum(values, data):
    payload = torch.tensor(values)
    before = checksum(payload)
    place, other = (data.draw(st.integers(0, len(values) - 1)) for _ in range(2))
    changed = payload.clone()
    changed[place] = payload[place] + 1 if place == other else payload[other]
    changed[other] = payload[place] if place != other else changed[other]
    same = torch.equal(changed.view(torch.int32), payload.view(torch.int32))
    assert (checksum(changed) == before) is same


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", weight_pack.CASTS, ids=str)
def test_pack_counts_what_is_not_finite(implementation, value, dtype):
    source = torch.tensor([1.0, value, 2.0, value])
    digests = pack_all([torch.ones(4), source], [torch.empty(4), torch.empty(4, dtype=dtype)])
    assert digests[:, 2].tolist() == [0, 2]


def test_bad_payloads_are_named():
    with pytest.raises(ValueError, match=r"source has shape \[4\]; allowed: \[5\]"):
        pack(torch.zeros(4), torch.zeros(5))
    with pytest.raises(ValueError, match="starting at a multiple of 16 bytes"):
        pack(torch.zeros(4), torch.zeros(9)[1:5])
