"""A trainer that publishes to a stock server and kills itself at a phase: URL FOLDER VERSION PHASE."""

import os
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[3]))

from oapl_engine.weights.publish import Publisher, publish_paused
from oapl_engine.weights.stock_server import StockServer
from tests.support.rig import WatchedControl


def main():
    url, folder, version, phase = sys.argv[1:]
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(folder)
    control = WatchedControl(StockServer(url))
    control.kill(os.getpid(), phase, "after" if int(version) % 4 < 2 and phase != "resume" else "before")
    publisher = Publisher(model.named_parameters, control, bucket_bytes=64 << 10, dtype=torch.float32)
    publish_paused(publisher, int(version))


if __name__ == "__main__":
    main()
