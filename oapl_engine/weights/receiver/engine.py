"""InPlaceUpdate behind vLLM's four phases of a weight transfer. Loaded by vLLM only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from oapl_engine.weights.receiver.layer_check import LayerProbe
from oapl_engine.weights.receiver.update import InPlaceUpdate


@dataclass
class InitInfo(WeightTransferInitInfo):
    """manifest: (name, dtype, shape) a tensor; layout: the fields of layout.Piece a piece; buffers: what the transport
    describes; unused: tensors that the model may leave aside."""

    manifest: list[Any]
    layout: list[Any]
    buffers: dict[str, Any]
    unused: list[str] = field(default_factory=list)


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Bucket number, bytes of it that are used, and the checksum of each piece in it by label."""

    bucket: int
    length: int
    checksums: dict[str, int]


class InPlaceWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The worker's end. report() is what WeightReport hands out."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.update = InPlaceUpdate(self.model, torch.distributed.get_rank())
        self.report = self.update.report
        self.model.register_forward_pre_hook(self._refuse_a_mix)

    def _refuse_a_mix(self, *_: Any) -> None:
        """Whoever resumes a paused server in mid-update gets a dead engine, never tokens of two versions."""
        if self.update.state != "complete":
            raise RuntimeError("weights are incomplete: publish a complete version before generating")

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.update.init(init_info.manifest, init_info.layout, init_info.buffers, init_info.unused)
        self.update.stale = LayerProbe(self.model).stale

    def start_weight_update(self) -> None:
        self.update.start()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As in the base class without its device synchronisation, which CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.update.receive(update_info.bucket, update_info.length, update_info.checksums)

    def finish_weight_update(self) -> None:
        self.update.finish()

    def shutdown(self) -> None:
        self.update.close()
