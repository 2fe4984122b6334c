"""Methods that vLLM adds to its worker (worker_extension_cls), called by collective_rpc."""

from __future__ import annotations

from typing import Any


class WeightReport:
    """Mixed into vLLM's Worker."""

    weight_transfer_engine: Any
    _weight_update_active: bool

    def weight_report(self) -> dict[str, Any]:
        """This rank's InPlaceWeightTransferEngine.report."""
        report: dict[str, Any] = self.weight_transfer_engine.report()
        return report

    def parameter_checksums(self) -> dict[str, int]:
        """This rank's InPlaceUpdate.parameter_checksums."""
        found: dict[str, int] = self.weight_transfer_engine.update.parameter_checksums()
        return found

    def abandon_weight_update(self) -> None:
        """Forget an update that was begun and not finished, so that the next one may start."""
        self._weight_update_active = False
