"""How buckets reach an engine. Each transport is one file with both ends: the trainer's Buckets, the engine's reader.

A new transport is a file and a line in TRANSPORTS. One from elsewhere needs no line: weights.transport =
"package.module:transport" names it, and the engine's process loads it under the same name. See docs/extending.md.

These files are loaded in vLLM's processes too: they need torch, the standard library and oapl_kernels, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from oapl_engine.errors import ConfigError, load_object, nearest

AUTO = "auto"


class Buckets:
    """The trainer's end: two buffers, filled in turn.

    views:      u8 tensors [size] to fill
    transport:  the name that the engine's end is found by; make_buckets sets it
    """

    views: list[torch.Tensor]
    transport: str = ""

    def describe(self) -> dict[str, Any]:
        """What the engine's end needs to attach: plain JSON."""
        raise NotImplementedError

    def send(self, index: int, length: int) -> None:
        """The first `length` bytes of a view are complete; called just before the engine is informed. Nothing to do
        where the engine reads them in place."""

    def wait(self, index: int) -> None:
        """Until a view may be filled again, after the engine answered; its answer comes after its last read."""

    def close(self) -> None:
        """Nothing is left behind."""
        raise NotImplementedError


class BucketReader:
    """The engine's end. buffers: one u8 tensor [size] per view of the trainer."""

    buffers: list[torch.Tensor]

    def wait_for(self, index: int, length: int) -> None:
        """The first `length` bytes of a buffer are there on return. Nothing to do where they are announced last."""

    def close(self) -> None:
        self.buffers = []


class BucketOptions(NamedTuple):
    """What a trainer's end is made with.

    size:    bytes of a bucket
    folder:  for files; None: a temporary one
    ranks:   of the engine
    """

    size: int
    folder: Path | None = None
    ranks: int = 1


class ReaderOptions(NamedTuple):
    """What an engine's end is made with.

    description:  what describe() of the trainer's end gave
    rank:         this process among the engine's ranks
    device:       of the engine's parameters
    """

    description: dict[str, Any]
    rank: int
    device: torch.device


class Transport(NamedTuple):
    """Both ends, and whether they need CUDA devices."""

    open_buckets: Callable[[BucketOptions], Buckets]
    open_reader: Callable[[ReaderOptions], BucketReader]
    needs_cuda: bool = False


TRANSPORTS = {
    "memfd": "oapl_engine.weights.transports.memfd:TRANSPORT",
    "file": "oapl_engine.weights.transports.file:TRANSPORT",
    "gloo": "oapl_engine.weights.transports.broadcast:GLOO",
    "nccl": "oapl_engine.weights.transports.broadcast:NCCL",
    "cuda_ipc": "oapl_engine.weights.transports.cuda_ipc:TRANSPORT",
}


def make_buckets(transport: str, size: int, folder: Path | None = None, ranks: int = 1) -> Buckets:
    """The trainer's end with buckets of `size` bytes. Raises ConfigError.

    transport: one of TRANSPORTS, "package.module:transport", or "auto": cuda_ipc where there is CUDA, else memfd
    """
    name = resolve_transport(transport)
    buckets = _find(name).open_buckets(BucketOptions(size, folder, ranks))
    buckets.transport = name
    return buckets


def open_reader(description: dict[str, Any], rank: int, device: torch.device) -> BucketReader:
    """The engine's end. description: what Buckets.describe gave, and "transport". ConfigError, ValueError, OSError."""
    return _find(description["transport"]).open_reader(ReaderOptions(description, rank, device))


def check_transport(transport: str) -> None:
    """Raises ConfigError for a name that is not there, or a transport that cannot work on this machine."""
    name = resolve_transport(transport)
    if _find(name).needs_cuda and not torch.cuda.is_available():
        raise ConfigError(
            f'weights.transport = "{name}", but there is no CUDA device; allowed here: memfd, file, gloo, or "auto"'
        )


def resolve_transport(transport: str) -> str:
    """The name that "auto" stands for on this machine; any other as it is."""
    if transport != AUTO:
        return transport
    return "cuda_ipc" if torch.cuda.is_available() else "memfd"


def _find(name: str) -> Transport:
    if name not in TRANSPORTS and ":" not in name:
        hint = nearest(name, [AUTO, *TRANSPORTS, "package.module:transport"])
        raise ConfigError(f'weights.transport = "{name}" is not a transport; {hint}')
    found = load_object(TRANSPORTS.get(name, name), "weights.transport")
    if not isinstance(found, Transport):
        raise ConfigError(f'weights.transport = "{name}" is not a weights.transports.Transport but {found!r:.80}')
    return found
