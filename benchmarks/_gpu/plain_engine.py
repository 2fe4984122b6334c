"""An engine without vLLM: the receiver of weights in a process of its own, around a PlainModel.

python -m benchmarks._gpu.plain_engine LAYERS HIDDEN INTERMEDIATE VOCABULARY DEVICE
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from benchmarks._plain_model import PlainModel, Size
from oapl_engine.weights.control import Attest, Bucket, Finish, Init, Inspect, Start, UpdateReply, UpdateRequest
from oapl_engine.weights.receiver.update import InPlaceUpdate


@dataclass
class PlainEngine:
    """The process, as an EngineControl. corrupt: send wrong checksums."""

    size: Size
    device: torch.device
    corrupt: bool = False
    process: Any = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks._gpu.plain_engine", *map(str, self.size), str(self.device)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, encoding="utf-8")

    def pause(self, mode: str) -> None:
        """Nothing runs."""

    def resume(self) -> None:
        """Nothing runs."""

    def score(self, token_ids: Sequence[int]) -> Any:
        raise NotImplementedError

    def update(self, request: UpdateRequest) -> UpdateReply:
        if self.corrupt and isinstance(request, Bucket):
            wrong = {label: value ^ 1 for label, value in request.checksums.items()}
            request = msgspec.structs.replace(request, checksums=wrong)
        print(json.dumps(msgspec.to_builtins(request)), file=self.process.stdin, flush=True)
        return msgspec.convert(json.loads(self.process.stdout.readline()), UpdateReply)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def answer(update: InPlaceUpdate, request: UpdateRequest) -> UpdateReply:
    reports = None
    try:
        match request:
            case Init(manifest, layout, buffers):
                update.init(manifest, layout, buffers)
            case Start():
                update.start()
            case Bucket(bucket, length, checksums):
                update.receive(bucket, length, checksums)
            case Finish():
                update.finish()
            case Inspect():
                reports = [update.parameter_checksums()]
            case Attest():
                pass
    except Exception as error:
        return UpdateReply(error=f"{type(error).__name__}: {error}", reports=[update.report()])
    return UpdateReply(reports=reports or [update.report()])


def main(argv: list[str]) -> None:
    *size, device = argv
    update = InPlaceUpdate(PlainModel(Size(*map(int, size)), torch.device(device)))
    for line in sys.stdin:
        request = msgspec.convert(json.loads(line), UpdateRequest)
        print(json.dumps(msgspec.to_builtins(answer(update, request))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
