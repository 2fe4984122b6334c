"""Buckets as files in a private folder: for engines that share nothing with the trainer but a file system."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch

from oapl_engine.weights.transports import BucketOptions, BucketReader, Buckets, ReaderOptions, Transport


class FileBuckets(Buckets):
    """Two files, rewritten in turn (mode 0600, folder 0700); both are gone after close().

    What killed trainers of this host left in the parent folder is removed first.
    """

    def __init__(self, options: BucketOptions) -> None:
        self.size = options.size
        parent, prefix = options.folder or Path(tempfile.gettempdir()), f"oapl-weights-{socket.gethostname()}-"
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.glob(f"{prefix}*"):
            if not Path("/proc", old.name.rsplit("-", 2)[1]).exists():
                shutil.rmtree(old, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
        self.views = [torch.zeros(self.size, dtype=torch.uint8) for _ in range(2)]

    def describe(self) -> dict[str, Any]:
        paths = [str(self._path(i).absolute()) for i in range(len(self.views))]
        return {"paths": paths, "size": self.size}

    def send(self, index: int, length: int) -> None:
        """Written under another name and renamed: the engine never sees half a bucket."""
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


class FileReader(BucketReader):
    """Reads each bucket from its file."""

    def __init__(self, options: ReaderOptions) -> None:
        self.paths = [Path(path) for path in options.description["paths"]]
        self.buffers = [torch.empty(options.description["size"], dtype=torch.uint8) for _ in self.paths]

    def wait_for(self, index: int, length: int) -> None:
        """Raises ValueError where the file has another length."""
        path = self.paths[index]
        with open(path, "rb", buffering=0) as file:
            place = memoryview(self.buffers[index][:length].numpy())
            while len(place) and (count := file.readinto(place)):
                place = place[count:]
            if len(place) or file.read(1):
                raise ValueError(f"{path} has {os.fstat(file.fileno()).st_size} bytes, {length} were announced")


TRANSPORT = Transport(FileBuckets, FileReader)
