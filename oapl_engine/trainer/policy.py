"""The policy: any transformers causal LM, its head, and its forward pass over packed rows."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from oapl_engine.samples import Batch
from oapl_engine.trainer import attention
from oapl_engine.trainer.head import Head, get_head, row_logprob
from oapl_engine.trainer.packing import TrainGroup, pack
from oapl_engine.trainer.packing_mode import PACKING_MODES, PackingMode


@dataclass
class Policy:
    """A causal LM on one device.

    model, tokenizer:  of transformers
    device:            where parameters and batches are
    matmul_dtype:      of matrix products; parameters keep their own dtype
    kernel:            of packed attention (trainer.attention.attention_kernel)
    packing_mode:      how rows may be packed (trainer.packing_mode)
    """

    model: PreTrainedModel
    tokenizer: Any
    device: torch.device
    matmul_dtype: torch.dtype
    kernel: str = "sdpa"
    packing_mode: PackingMode = PACKING_MODES[0]

    @property
    def head(self) -> Head:
        """Its output embeddings and what its config does to logits afterwards."""
        return get_head(self.model)

    @property
    def decoder(self) -> PreTrainedModel:
        """The model up to its last norm: without its head."""
        found = self.model.get_decoder()
        if found is self.model or not isinstance(found, PreTrainedModel):  # not found, or a layer of the head
            found = self.model.model
        return found

    @property
    def vocabulary(self) -> int:
        """Rows of the head: token ids are below it."""
        return len(self.head.weight)

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast where the matrix products are narrower than the parameters."""
        parameter = next(self.model.parameters()).dtype
        narrower = self.matmul_dtype == torch.bfloat16 and parameter == torch.float32
        return torch.autocast(self.device.type, self.matmul_dtype, enabled=narrower)

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states [T, D] after the last norm. Raises RuntimeError if the rows would be read wrongly."""
        if not self.packing_mode.together and len(batch.keys) != 1:
            raise RuntimeError(
                f"{len(batch.keys)} sequences in a batch, but {self.packing_mode.reason}: pack one by one"
            )
        plan = attention.use_plan(self._plan(batch)) if self.packing_mode.together else nullcontext()
        token_ids = torch.from_numpy(batch.token_ids).to(self.device)[None]
        positions = torch.from_numpy(batch.positions).to(self.device)[None]
        with self.precision(), plan:
            out = self.decoder(input_ids=token_ids, position_ids=positions, use_cache=False)
        return out.last_hidden_state[0]

    def _plan(self, batch: Batch) -> attention.AttentionPlan:
        for part in (self.model, self.decoder):
            if part.config._attn_implementation != attention.NAME:
                raise RuntimeError(
                    f'{type(part).__name__} uses attention "{part.config._attn_implementation}", which reads packed '
                    f'rows wrongly; set it back to "{attention.NAME}"'
                )
        return attention.plan_attention(batch.prompts, self.device, self.kernel)

    def batches(self, groups: list[TrainGroup], token_budget: int, share_prompts: bool) -> list[Batch]:
        """Packed micro-batches in a packing mode that this model computes exactly."""
        budget = token_budget if self.packing_mode.together else 1
        return pack(groups, budget, share_prompts and self.packing_mode.share)

    def logprob(self, batch: Batch, temperature: float) -> Tensor:
        """Log-probs [R] of the batch's scored rows, f32."""
        with self.precision():
            return row_logprob(self.head, self.hidden(batch), batch, temperature)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name to parameter, tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def published_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face name and weight, as served, in turn: LoRA merged into a copy of its base, tied weights once."""
    modules = policy.model.named_modules()
    adapters = {f"{name}.base_layer.weight": m for name, m in modules if isinstance(m, LoraLayer)}
    for name, parameter in policy.model.named_parameters():
        weight = parameter.detach()
        if name in adapters:
            weight = weight + adapters[name].get_delta_weight("default").detach().to(weight.dtype)
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), weight
