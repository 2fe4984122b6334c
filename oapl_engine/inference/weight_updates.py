"""Requests of a weight update, carried out on vLLM; an engine serves only complete, attested versions."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from oapl_engine.weights.control import (
    Attest,
    Bucket,
    Finish,
    Init,
    Inspect,
    Start,
    UpdateReply,
    UpdateRequest,
    to_fields,
)

logger = logging.getLogger("oapl_engine.inference")


@dataclass
class WeightState:
    """Of the weights: complete → incomplete (an update began) → unattested (it finished) → complete.

    version:   of the weights in place; arriving: of the update that began last
    """

    version: int
    arriving: int
    state: str = "complete"

    def refuse_unless(self, *states: str) -> None:
        if self.state not in states:
            raise RuntimeError(f"weights are {self.state} (version {self.arriving}): publish a complete version first")


class WeightUpdates:
    """Carries out the requests of oapl_engine.weights.control.

    llm:          vLLM's AsyncLLM, or what a test puts in its place
    state:        of the engine's weights; changed here
    check_still:  raises RuntimeError unless the engine is paused, awake and computes nothing
    """

    def __init__(self, llm: Any, state: WeightState, check_still: Callable[[], None]) -> None:
        self.llm = llm
        self.state = state
        self.check_still = check_still

    async def answer(self, request: dict[str, Any]) -> UpdateReply:
        """One request of a weight update, carried out or refused with the reason."""
        typed: UpdateRequest = msgspec.convert(request, UpdateRequest)
        error, refused = None, {}
        try:
            await self._carry_out(typed)
        except CachedBlocksError as found:
            error, refused = str(found), found.refused
        except Exception as refusal:
            logger.exception("update %s was refused", type(typed).__name__)
            error = str(refusal)
        reports: list[dict[str, Any]] = []
        if isinstance(typed, Inspect):
            reports = await self.llm.collective_rpc("parameter_checksums")
        elif error or isinstance(typed, Finish):
            reports = await self.llm.collective_rpc("weight_report")
        return UpdateReply(self.state.state, self.state.version, error, refused, reports)

    async def _carry_out(self, request: UpdateRequest) -> None:
        match request:
            case Init():
                await self._init(request)
            case Start(version):
                await self._start(version)
            case Bucket():
                await self._bucket(request)
            case Finish():
                await self._finish()
            case Attest(accepted):
                if accepted:
                    self.state.refuse_unless("unattested")
                self.state.state = "complete" if accepted else "incomplete"
            case Inspect():
                pass

    async def _init(self, request: Init) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=to_fields(request)))

    async def _start(self, version: int) -> None:
        self.check_still()
        if version <= self.state.arriving:
            raise ValueError(f"version {version} after {self.state.arriving}: versions only grow")
        await self.llm.reset_prefix_cache()
        await self.llm.collective_rpc("abandon_weight_update")
        self.state.state, self.state.arriving = "incomplete", version
        await self.llm.start_weight_update()

    async def _bucket(self, request: Bucket) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.llm.update_weights(WeightTransferUpdateRequest(update_info=to_fields(request)))

    async def _finish(self) -> None:
        if self.state.state != "incomplete":
            raise RuntimeError(f"finish without start: weights are {self.state.state}")
        await self.llm.finish_weight_update(str(self.state.arriving))
        blocks = await self.llm.engine_core.call_utility_async("oapl_cached_blocks")
        if blocks:
            raise CachedBlocksError(blocks)
        self.state.state, self.state.version = "unattested", self.state.arriving


class CachedBlocksError(RuntimeError):
    """KV of an earlier version is still there. refused: for UpdateReply."""

    def __init__(self, blocks: int) -> None:
        super().__init__(f"prefix cache: {blocks} blocks of the version before are still there")
        self.refused = {
            "parameter": "prefix cache",
            "expected": "no blocks of the version before",
            "found": f"{blocks} of them",
        }
