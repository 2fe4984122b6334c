"""One rank of a trainer sharded by FSDP2, with an engine of its own or without; prints what it gathered as JSON."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[3]))

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from oapl_engine.weights import bucket_layout as layout
from oapl_engine.weights.publish import Publisher, publish_paused
from tests.support.engines import ReceiverEngine
from tests.support.fused_model import FEW, HIDDEN, FusedModel, trainer_tensors

BUCKET = 160  # bytes, 40 elements: all matrices are split


class Trainer(nn.Module):
    """The trainer's tensors as parameters; `thin` has fewer rows than there are ranks and stays at home."""

    def __init__(self):
        super().__init__()
        for name, tensor in trainer_tensors().items():
            setattr(self, name, nn.Parameter(tensor))


def watch(seen):
    """Count what is gathered."""
    original = layout.flat_slice

    def counted(tensor, start, count):
        found = original(tensor, start, count)
        seen.append(found.untyped_storage().nbytes() // found.element_size())
        return found

    layout.flat_slice = counted
    sys.modules["oapl_engine.weights.send"].flat_slice = counted


def main():
    rank, store, engines = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = Trainer()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    seen, refused = [], []
    watch(seen)
    engine = ReceiverEngine(FusedModel())
    publisher = Publisher(model.named_parameters, engine, bucket_bytes=BUCKET, dtype=torch.float32)
    for version, dies in enumerate(("pause", None, "bucket", "start", "pause", None), 1):
        if rank == 0 and dies:  # its engine: the other rank must not notice
            engine.before[dies] = lambda request: (_ for _ in ()).throw(ConnectionError("dead"))
        try:
            if rank < engines:
                publish_paused(publisher, version)
            else:
                layout.join_gathers(model.named_parameters, torch.float32, BUCKET)
        except ConnectionError as error:
            refused.append(type(error).__name__)
            engine.before.clear()
    fresh = FusedModel()
    fresh.load_weights(trainer_tensors().items())
    pairs = zip(engine.receiver.model.parameters(), fresh.parameters(), strict=True)
    report = {
        "identical": all(torch.equal(a, b) for a, b in pairs) if rank < engines else None,
        "largest": max(seen),
        "gathered": sum(seen),
        "bucket_elements": BUCKET // 4,
        "model_elements": FEW * HIDDEN + 4 * HIDDEN * HIDDEN + HIDDEN,
        "publishes": 6,
        "refused": refused,
    }
    print(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
