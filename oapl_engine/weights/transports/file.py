"""Buckets as files in a private folder: for engines that share nothing with the trainer but a file system."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch

from oapl_engine.weights.transports import Buckets


class FileBuckets(Buckets):
    """Two files, rewritten in turn (mode 0600, folder 0700); both are gone after close(). What killed trainers of this
    host left in `folder` goes first."""

    def __init__(self, size: int, folder: Path | None = None) -> None:
        self.size = size
        parent, ours = folder or Path(tempfile.gettempdir()), f"oapl-weights-{socket.gethostname()}-"
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.glob(f"{ours}*"):
            if not Path("/proc", old.name.rsplit("-", 2)[1]).exists():
                shutil.rmtree(old, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{ours}{os.getpid()}-", dir=parent))
        self.views = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]

    def describe(self) -> dict[str, Any]:
        paths = [str(self._path(i).absolute()) for i in range(len(self.views))]
        return {"transport": "file", "paths": paths, "size": self.size}

    def send(self, index: int, length: int) -> None:
        """Written beside and renamed: the engine never sees half a bucket."""
        part = self._path(index).with_suffix(".part")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0) as file:
            rest = memoryview(self.views[index][:length].numpy())
            while len(rest):
                rest = rest[file.write(rest) :]
        part.rename(self._path(index))

    def close(self) -> None:
        self.views = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"bucket{index}"
