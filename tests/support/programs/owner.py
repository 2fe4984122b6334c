"""A trainer that owns an engine, publishes one version and kills itself at a phase of the second: FOLDER PHASE."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.support.rig import Rig


def main():
    folder, phase = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    rig = Rig(folder)
    rig.publish()
    print(rig.engine.pid, rig.engine._folder, flush=True)
    rig.control.kill(os.getpid(), phase, "after")
    rig.change()
    rig.publisher.engine_restarted()
    rig.publish()


if __name__ == "__main__":
    main()
