"""A receiver as a process of its own: requests and replies are JSON lines; `parameters` gives the live bytes."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from oapl_engine.weights.receiver.update import InPlaceUpdate
from tests.support.fused_model import FusedModel


def answer(update, phase, payload):
    error = found = None
    try:
        if phase == "init":
            update.init(**payload, unused=[])
        elif phase == "start":
            update.start()
        elif phase == "bucket":
            update.receive(**payload)
        elif phase == "finish":
            update.finish()
        elif phase == "parameters":
            found = {n: p.detach().view(torch.uint8).flatten().tolist() for n, p in update.model.named_parameters()}
    except Exception as refusal:
        error = f"{type(refusal).__name__}: {refusal}"
    return {"error": error, "reports": [update.report()], "found": found}


def main():
    torch.set_num_threads(1)
    update = InPlaceUpdate(FusedModel(), int(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(answer(update, *json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
