"""A trainer that publishes to a stock server and kills itself at a phase: URL FOLDER VERSION PHASE."""

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[3]))

from oapl_engine.weights.publish import Publisher
from oapl_engine.weights.stock_server import stock_server_control


def main():
    url, folder, version, phase = sys.argv[1:]
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(folder)
    control = stock_server_control(url)

    def deadly(name, payload):
        if name == phase and payload.get("bucket", 2) == 2:
            if int(version) % 4 < 2 and name != "resume":  # before the call, or after it
                control(name, payload)
            os.kill(os.getpid(), signal.SIGKILL)
        return control(name, payload)

    Publisher(model.named_parameters, deadly, 64 << 10, torch.float32).publish(int(version))


if __name__ == "__main__":
    main()
