"""A receiver as a process of its own: requests and replies are JSON lines; Inspect gives the live bytes. RANK"""

import json
import sys
from pathlib import Path

import msgspec
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from oapl_engine.weights.control import Inspect, UpdateReply, UpdateRequest
from oapl_engine.weights.receiver.update import InPlaceUpdate
from tests.support.engines import carry_out
from tests.support.fused_model import FusedModel


def answer(update, request):
    if isinstance(request, Inspect):
        named = update.model.named_parameters()
        return UpdateReply(reports=[{n: p.detach().view(torch.uint8).flatten().tolist() for n, p in named}])
    error = None
    try:
        carry_out(update, request)
    except Exception as refusal:
        error = f"{type(refusal).__name__}: {refusal}"
    return UpdateReply(error=error, reports=[update.report()])


def main():
    torch.set_num_threads(1)
    update = InPlaceUpdate(FusedModel(), int(sys.argv[1]))
    for line in sys.stdin:
        request = msgspec.convert(json.loads(line), UpdateRequest)
        print(json.dumps(msgspec.to_builtins(answer(update, request))), flush=True)


if __name__ == "__main__":
    main()
