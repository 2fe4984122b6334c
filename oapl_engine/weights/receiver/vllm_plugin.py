"""vLLM's side of the plugin: InPlaceUpdate behind its four phases of a weight transfer, and the worker's extension.

Loaded by vLLM only, when an engine selects our backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.v1.worker.gpu_worker import Worker

from oapl_engine.weights.receiver.layer_check import LayerCheck
from oapl_engine.weights.receiver.mix_guard import refusing_a_mix
from oapl_engine.weights.receiver.update import InPlaceUpdate


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Fields of weights.control.Init."""

    manifest: list[Any]
    layout: list[Any]
    buffers: dict[str, Any]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Fields of weights.control.Bucket."""

    bucket: int
    length: int
    checksums: dict[str, int]


class InPlaceWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The worker's end."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.update = InPlaceUpdate(self.model, torch.distributed.get_rank())
        Worker.execute_model = refusing_a_mix(Worker.execute_model)  # type: ignore[method-assign]

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.update.init(init_info.manifest, init_info.layout, init_info.buffers)
        self.update.stale = LayerCheck(self.model).stale

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


class WeightReport:
    """Methods that vLLM adds to its worker (worker_extension_cls), called by collective_rpc."""

    weight_transfer_engine: Any
    _weight_update_active: bool

    def weight_report(self) -> dict[str, Any]:
        """This rank's InPlaceUpdate.report."""
        report: dict[str, Any] = self.weight_transfer_engine.update.report()
        return report

    def parameter_checksums(self) -> dict[str, int]:
        """This rank's InPlaceUpdate.parameter_checksums."""
        found: dict[str, int] = self.weight_transfer_engine.update.parameter_checksums()
        return found

    def abandon_weight_update(self) -> None:
        """Forget an update that was begun and not finished, so that the next one may start."""
        self._weight_update_active = False
