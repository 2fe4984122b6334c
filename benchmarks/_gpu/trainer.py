"""The trainer on this device: shared prompts on varlen attention, offload and return, a checkpoint and its restore."""

import inspect
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from oapl_kernels.objectives import oapl
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._gpu.report import DEVICE, DRY, FLOAT, HALF, median_seconds, peak_megabytes, synchronize, write_row
from oapl_engine.config import OptimizerConfig
from oapl_engine.samples import Batch, Prompt, make_rollout
from oapl_engine.trainer import attention, checkpoint, offload
from oapl_engine.trainer.optimizer import make_optimizer
from oapl_engine.trainer.packing import TrainGroup, pack
from oapl_engine.trainer.packing_probe import choose_packing_mode
from oapl_engine.trainer.policy import Policy
from oapl_engine.trainer.step import accumulate_gradients, train_step

VOCABULARY, ROW_BUDGET, RATE = 512 if DRY else 49152, 32768, 1e-9


class Setting(NamedTuple):
    """How a group is computed. kernel: None for the one that model.attention = "auto" chooses."""

    name: str
    precision: torch.dtype
    share_prompts: bool
    kernel: str | None


class GroupSize(NamedTuple):
    """Of one group: tokens of the prompt, responses, longest response."""

    prompt: int
    responses: int
    longest: int


SETTINGS = (
    Setting("fp32 sdpa repeated", FLOAT, False, "sdpa"),  # grouped heads run SDPA's math kernel: small groups only
    Setting("bf16 sdpa shared", HALF, True, "sdpa"),
    Setting("bf16 varlen repeated", HALF, False, None),
    Setting("bf16 varlen shared", HALF, True, None),
)
GROUPS = (GroupSize(32, 4, 16),) if DRY else (GroupSize(512, 8, 768), GroupSize(2048, 16, 2048))
FP32_LONGEST_PROMPT = 512


class Trainer:
    """SmolLM2-135M's shape on random weights, with its optimizer and one group's batches."""

    def __init__(self, setting: Setting, group: TrainGroup) -> None:
        torch.manual_seed(0)
        self.network = LlamaForCausalLM(_config()).to(DEVICE).eval()
        kernel = setting.kernel or attention.attention_kernel("auto", DEVICE, setting.precision)
        self.policy = Policy(self.network, None, DEVICE, setting.precision, kernel)
        choose_packing_mode(self.policy)
        self.network.train()
        self.optimizer = make_optimizer(self.policy, OptimizerConfig(learning_rate=RATE))
        self.batches: list[Batch] = pack([group], ROW_BUDGET, setting.share_prompts)
        self.normalizer = float(len(group.rollouts))

    def step(self) -> None:
        train_step(self.policy, self.optimizer, self.batches, oapl(0.1), learning_rate=RATE, normalizer=self.normalizer)

    def gradient(self) -> torch.Tensor:
        """Of all parameters together."""
        accumulate_gradients(self.policy, self.batches, oapl(0.1), normalizer=self.normalizer)
        found = torch.cat([parameter.grad.flatten() for parameter in self.network.parameters()])
        self.optimizer.zero_grad(set_to_none=False)
        return found


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2 if DRY else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def check_trainer() -> None:
    """Gradients of every setting against the first one of the group's size; then offload, and restore."""
    varlen, draw = _adapt_varlen(), np.random.default_rng(0)
    for size in GROUPS:
        group, reference = _make_group(size, draw), None
        for setting in SETTINGS[int(size.prompt > FP32_LONGEST_PROMPT) :]:
            trainer = Trainer(setting, group)
            found = trainer.gradient()
            reference = found if reference is None else reference
            write_row(
                "trainer",
                size=size,
                what=setting.name,
                kernel=trainer.policy.kernel,
                shares=trainer.policy.packing_mode.share,
                varlen=varlen,
                rows=sum(len(batch.token_ids) for batch in trainer.batches),
                ms=median_seconds(trainer.step, 5) * 1e3,
                peak_mb=peak_megabytes(trainer.step),
                gradient_off_first_row=float((found - reference).norm() / reference.norm()),
            )
    _check_offload(trainer)
    _check_restore(trainer)


def _adapt_varlen() -> str:
    """torch 2.11's varlen_attn has no enable_gqa: its flash kernel takes grouped heads without it."""
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return "as shipped"

    def without_option(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap):  # type: ignore[no-untyped-def]
        sides = (-1, 0) if window is None else (window - 1, 0)
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=sides)

    attention._varlen = without_option
    return "adapted: enable_gqa left out"


def _make_group(size: GroupSize, draw: np.random.Generator) -> TrainGroup:
    prompt = Prompt("0", draw.integers(5, VOCABULARY, size.prompt).astype(np.int32), "")
    rollouts = []
    for i, length in enumerate(draw.integers(size.longest // 4, size.longest + 1, size.responses)):
        response = draw.integers(5, VOCABULARY, length)
        rollouts.append(
            make_rollout(
                prompt,
                "0.0.0",
                i,
                response,
                logprobs=draw.uniform(-11.5, -10.5, length),
                spans=(),
                finish="stop",
                status="scored",
                reward=0.0,
            )
        )
    return TrainGroup(tuple(rollouts), draw.normal(size=size.responses).astype(np.float32))


def _check_offload(trainer: Trainer) -> None:
    """To host memory and back: the bits, the speed, the device memory that becomes free."""
    before = [parameter.detach().cpu().clone() for parameter in trainer.network.parameters()]
    free, begin = _free_bytes(), time.perf_counter()
    moved = offload.move_trainer(trainer.policy, trainer.optimizer, torch.device("cpu"))
    out, freed = time.perf_counter() - begin, _free_bytes() - free
    begin = time.perf_counter()
    offload.move_trainer(trainer.policy, trainer.optimizer, DEVICE)
    synchronize()
    back = time.perf_counter() - begin
    same = all(torch.equal(x, y.cpu()) for x, y in zip(before, trainer.network.parameters(), strict=True))
    rates = {"out_gb_s": moved / out / 1e9, "back_gb_s": moved / back / 1e9}
    write_row("offload", gb=moved / 1e9, **rates, freed_gb=freed / 1e9, same=same)


def _free_bytes() -> int:
    return 0 if DRY else torch.cuda.mem_get_info()[0]


def _check_restore(trainer: Trainer) -> None:
    """A step after a restored checkpoint: every part of the optimizer's state is where the fused AdamW wants it."""
    trainer.step()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), 1, trainer.policy, trainer.optimizer, {}, 1)
        checkpoint.restore(checkpoint.load_newest(Path(folder)), trainer.policy, trainer.optimizer)
    failed = ""
    try:
        trainer.step()
    except RuntimeError as error:
        failed = str(error)[:200]
    write_row("restore", steps_again=not failed, failed=failed)
