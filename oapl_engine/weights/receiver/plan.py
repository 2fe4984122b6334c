"""The plan of a transfer: what the model's own load_weights does with each trainer tensor, recorded once, checked, and
replayed at every publish as plain strided copies into live storage.

Recording watches every write that reaches the storage of a live parameter while load_weights runs on meta tensors; the
live values are not touched. Fused projections, tied embeddings, tensor-parallel shards, transposes and vocabulary
padding come out by themselves; what is not a plain copy (casts, derived weights, packed experts) is refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oapl_engine.weights.control import TensorEntry

aten = torch.ops.aten
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PlanError(ValueError):
    """The model cannot be updated in place from these tensors. parameter: the first that is in the way."""

    def __init__(self, parameter: str, expected: str, found: str) -> None:
        super().__init__(f"{parameter}: expected {expected}, found {found}")
        self.parameter, self.expected, self.found = parameter, expected, found


@dataclass(frozen=True)
class StridedView:
    """Elements of a tensor's storage.

    name:                   of the tensor
    offset, shape, stride:  in elements
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.as_strided(tensor, self.shape, self.stride, self.offset)

    def rows(self, dim: int, start: int, stop: int) -> StridedView:
        """Narrowed in one dimension."""
        shape = (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])
        return StridedView(self.name, self.offset + start * self.stride[dim], shape, self.stride)


def restrict(
    live: StridedView, source: StridedView, start: int, stop: int
) -> Iterator[tuple[StridedView, StridedView]]:
    """The parts of a copy whose source elements are in [start, stop): rows of the dimension with the longest stride,
    and what is inside of the two rows at the ends.

    Example: a [4, 10] tensor, row-major, restricted to elements [12, 35): rows 2 (20…29), the end of row 1 (12…19) and
    the beginning of row 3 (30…34).
    """
    last = source.offset + sum((n - 1) * s for n, s in zip(source.shape, source.stride, strict=True))
    if start <= source.offset and last < stop:
        yield live, source
    elif source.offset < stop and start <= last:
        dim = max(range(len(source.shape)), key=lambda d: source.stride[d] if source.shape[d] > 1 else 0)
        count, step = source.shape[dim], source.stride[dim]
        inner = last - source.offset - (count - 1) * step
        if inner >= step:
            strides = f"shape {source.shape} with strides {source.stride}; raise weights.bucket_mb"
            raise PlanError(source.name, "rows that do not interleave where a tensor is split over buckets", strides)
        first = max(-(-(start - source.offset) // step), 0)
        end = min((stop - 1 - inner - source.offset) // step + 1, count)
        for a, b in sorted({(first - 1, first), (first, max(first, end)), (max(first, end), max(first, end) + 1)}):
            if 0 <= a < b <= count:
                yield from restrict(live.rows(dim, a, b), source.rows(dim, a, b), start, stop)


@dataclass(frozen=True)
class Plan:
    """What a publish does.

    copies:   trainer tensor to its (live view, view of the trainer tensor) pairs
    padding:  (live view, constant)
    """

    copies: dict[str, list[tuple[StridedView, StridedView]]]
    padding: list[tuple[StridedView, float]]


def record(model: torch.nn.Module, manifest: Iterable[TensorEntry]) -> Plan:
    """The plan for the tensors of a manifest. Raises PlanError unless every element of every live parameter is written
    exactly once (or is padding) and every tensor is used."""
    live = live_parameters(model)
    recorder = Recorder(live)
    with torch.no_grad(), recorder:
        try:
            model.load_weights(recorder.feed(manifest))
        except PlanError:
            raise
        except Exception as error:  # a model's own loader, which may raise anything at a name or shape it does not know
            raise PlanError(recorder.current, "a tensor that load_weights takes", f"{error!r}") from error
    _check_coverage(live, recorder)
    for name in recorder.sources.values():
        if name not in recorder.copies:
            raise PlanError(name, "to be used by load_weights", "no copy of it")
    return Plan(dict(recorder.copies), recorder.padding)


def live_parameters(model: torch.nn.Module) -> dict[int, tuple[str, torch.Tensor]]:
    """Storage id → (name, parameter); parameters that share storage (tied) appear once, under the first name."""
    live: dict[int, tuple[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise PlanError(name, "live storage", "size 0: the weight was packed after loading and its bytes are gone")
        live.setdefault(parameter.untyped_storage()._cdata, (name, parameter.data))
    return live


class Recorder(TorchDispatchMode):
    """Keeps copy_ and fill_ calls into live storage from happening, and remembers them."""

    def __init__(self, live: dict[int, tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        self.live = live
        self.copies: dict[str, list[tuple[StridedView, StridedView]]] = defaultdict(list)
        self.padding: list[tuple[StridedView, float]] = []
        self.sources: dict[int, str] = {}
        self.current = "(nothing yet)"
        self._kept: list[torch.Tensor] = []

    def feed(self, manifest: Iterable[TensorEntry]) -> Iterator[tuple[str, torch.Tensor]]:
        """Meta tensors of the manifest; kept, so that no two share a storage id."""
        for name, dtype, shape in manifest:
            tensor = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
            self._kept.append(tensor)
            self.sources[tensor.untyped_storage()._cdata] = self.current = name
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = self._written(func, args, kwargs or {})
        if target is None:
            return func(*args, **(kwargs or {}))
        name = self.live[target.untyped_storage()._cdata][0]
        region = StridedView(name, target.storage_offset(), tuple(target.shape), tuple(target.stride()))
        if func is aten.copy_.default:
            self._copy(region, target, args[1])
        elif func in (aten.fill_.Scalar, aten.zero_.default):
            self.padding.append((region, 0.0 if func is aten.zero_.default else float(args[1])))
        else:
            raise PlanError(name, "plain copies and fills", f"a write by {func}: needs vLLM's layerwise reload")
        return target

    def _written(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self.live:
                return value
        return None

    def _copy(self, region: StridedView, target: torch.Tensor, source: torch.Tensor) -> None:
        name = self.sources.get(source.untyped_storage()._cdata)
        if name is None:
            raise PlanError(self.current, "to reach the model unchanged", f"a computed tensor written to {region.name}")
        if source.dtype != target.dtype:
            raise PlanError(name, f"dtype {target.dtype} as in the engine", str(source.dtype))
        source = source.expand(target.shape)
        origin = StridedView(name, source.storage_offset(), tuple(source.shape), tuple(source.stride()))
        self.copies[name].append((region, origin))


def _check_coverage(live: dict[int, tuple[str, torch.Tensor]], recorder: Recorder) -> None:
    written: dict[str, list[StridedView]] = defaultdict(list)
    for pairs in recorder.copies.values():
        for region, _ in pairs:
            written[region.name].append(region)
    for region, _ in recorder.padding:
        written[region.name].append(region)
    for name, parameter in live.values():
        counts = torch.zeros(parameter.untyped_storage().nbytes() // parameter.element_size(), dtype=torch.uint8)
        for region in written[name]:
            region.view(counts).add_(1)
        missing, twice = int((counts == 0).sum()), int((counts > 1).sum())
        if missing or twice:
            raise PlanError(
                name, f"each of {counts.numel()} elements written once", f"{missing} never, {twice} more than once"
            )
