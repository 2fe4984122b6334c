"""Weights on their way to an engine: cast, pack and checksum in one reading.

The checksum of a payload is over its bytes as little-endian u32 words w_i, zero-padded:
h_k = sum_i fmix32(w_i xor fmix32(i + SEEDS[k])) mod 2^32 for k = 0, 1, returned as h_0 | h_1 << 32. It depends on the
order of words, is summed in parallel, and is the same on every backend.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .backend import extension, runs_triton
from .checks import check_tensor
from .compiler import operation

SEEDS = (0x9E3779B9, 0x7F4A7C15)
CASTS = (torch.bfloat16, torch.float16, torch.float32)


def _fake_digest(source: Tensor, payload: Tensor) -> Tensor:
    return payload.new_empty(3, dtype=torch.int32)


@operation(_fake_digest, mutates=("payload",))
def pack_payload(source: Tensor, payload: Tensor) -> Tensor:
    """`pack` of a source whose shape and dtype are known to be right."""
    _check_place(payload)
    source = source.contiguous().view(-1)
    if runs_triton(payload):
        from .weight_pack_triton import pack_words

        return pack_words(source, payload)
    return _pack_on_cpu([source], [payload])[0]


def _check_place(payload: Tensor) -> None:
    if not payload.is_contiguous() or payload.data_ptr() % 16:
        raise ValueError(
            f"payload starts at address {payload.data_ptr()} with strides {payload.stride()}; "
            "allowed: contiguous, starting at a multiple of 16 bytes"
        )


def pack(source: Tensor, payload: Tensor) -> Tensor:
    """Cast source (any shape, to nearest even) into payload [n], a slice of a bucket that starts at a multiple of 16
    bytes. Returns its digest [3] int32 (h_0, h_1, values that are not finite) on the same device, without waiting."""
    check_tensor("source", source.reshape(-1), (len(payload),), CASTS, payload.device)
    check_tensor("payload", payload, (None,), CASTS, source.device)
    return pack_payload(source.detach(), payload)


def pack_all(sources: list[Tensor], payloads: list[Tensor]) -> Tensor:
    """`pack` of many: digests [number, 3] int32. On CPU all in one call, because starting threads takes a while."""
    if sources and payloads[0].device.type == "cpu" and not runs_triton(payloads[0]):
        for source, payload in zip(sources, payloads, strict=True):
            check_tensor("source", source.reshape(-1), (len(payload),), CASTS, payload.device)
            _check_place(payload)
        return _pack_on_cpu([source.detach().contiguous().view(-1) for source in sources], payloads)
    digests = [pack(source, payload) for source, payload in zip(sources, payloads, strict=True)]
    return torch.stack(digests) if digests else torch.empty(0, 3, dtype=torch.int32)


def checksum_all(payloads: list[Tensor]) -> list[int]:
    """The 64-bit checksums of the bytes of contiguous tensors; on CPU of any dtype, on a GPU of one of CASTS."""
    if payloads and runs_triton(payloads[0]):
        digests = torch.stack([pack(payload, payload) for payload in payloads]).cpu().to(torch.int64) & 0xFFFFFFFF
        return [low | high << 32 for low, high, _ in digests.tolist()]
    return [low | high << 32 for low, high in _checksums_on_cpu(payloads)]


def combine_checksums(values: Iterable[int]) -> str:
    """16 hex digits of many checksums together: the halves' sums mod 2^32, whatever their order."""
    low, high = np.array([(v & 0xFFFFFFFF, v >> 32) for v in values], np.uint64).reshape(-1, 2).sum(0) & 0xFFFFFFFF
    return f"{int(low) | int(high) << 32:016x}"


def copy_and_count_changes(payloads: list[Tensor], destinations: list[Tensor]) -> int:
    """Copy payloads [n] bit for bit to destinations [n] of the same dtype, of 2 or 4 bytes, all contiguous and on
    the CPU. Returns how many elements changed their bits."""
    pairs = list(zip(payloads, destinations, strict=True))
    for payload, destination in pairs:
        check_tensor("destination", destination, (len(payload),), (payload.dtype,), torch.device("cpu"))
        if not (payload.is_contiguous() and destination.is_contiguous()) or payload.itemsize not in (2, 4):
            raise ValueError(
                f"payload is {payload.dtype} with strides {payload.stride()}, destination has {destination.stride()}; "
                "allowed: contiguous tensors of 2 or 4 bytes per element"
            )
    cpp = extension()
    if cpp is not None:
        copies = [cpp.Copy(p.data_ptr(), d.data_ptr(), len(p), p.itemsize) for p, d in pairs]
        return int(cpp.copy_and_count_changes(copies, torch.get_num_threads()))
    changed = 0
    for payload, destination in pairs:
        bits = torch.int16 if payload.itemsize == 2 else torch.int32
        changed += int(torch.count_nonzero(payload.view(bits) != destination.view(bits)))
        destination.copy_(payload)
    return changed


def _pack_on_cpu(sources: list[Tensor], payloads: list[Tensor]) -> Tensor:
    cpp = extension()
    fused = (torch.float32, torch.bfloat16)
    pairs = list(zip(sources, payloads, strict=True))
    if cpp is not None and all(s.dtype == p.dtype or (s.dtype, p.dtype) == fused for s, p in pairs):
        formats = {dtype: getattr(cpp.Format, str(dtype).removeprefix("torch.")) for dtype in CASTS}
        casts = [cpp.Cast(s.data_ptr(), formats[s.dtype], p.data_ptr(), formats[p.dtype], len(p)) for s, p in pairs]
        found = [(d.h0, d.h1, d.nonfinite) for d in cpp.pack(casts, cpp.Seeds(*SEEDS), torch.get_num_threads())]
    else:
        for source, payload in pairs:
            payload.copy_(source)
        nonfinite = [len(payload) - int(torch.isfinite(payload).sum()) for payload in payloads]
        found = [(*sums, count) for sums, count in zip(_checksums_on_cpu(payloads), nonfinite, strict=True)]
    return torch.tensor(found, dtype=torch.int64).to(torch.int32)


def _checksums_on_cpu(payloads: list[Tensor]) -> list[tuple[int, int]]:
    cpp = extension()
    if cpp is None:
        return [_checksum_in_numpy(payload) for payload in payloads]
    spans = [cpp.Bytes(payload.data_ptr(), payload.nbytes) for payload in payloads]
    return [(d.h0, d.h1) for d in cpp.checksum(spans, cpp.Seeds(*SEEDS), torch.get_num_threads())]


def _checksum_in_numpy(payload: Tensor) -> tuple[int, int]:
    data = payload.view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(data + bytes(-len(data) % 4), "<u4")
    index = np.arange(len(words), dtype=np.uint64).astype(np.uint32)
    low, high = (int(_mix(words ^ _mix(index + np.uint32(seed))).sum(dtype=np.uint64)) for seed in SEEDS)
    return low & 0xFFFFFFFF, high & 0xFFFFFFFF


def _mix(h: np.ndarray) -> np.ndarray:
    """MurmurHash3's 32-bit finaliser."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
