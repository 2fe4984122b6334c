"""After a publish a live engine equals an engine that loads the same checkpoint by itself: every byte of its parameters
and every greedy token, whatever the architecture, over every transport that runs here."""

import copy
import functools

import numpy as np
import pytest
import torch

from oapl_engine.inference.options import EngineOptions
from oapl_engine.inference.protocol import Sampling
from oapl_engine.rollout.session import EngineSession
from oapl_engine.samples import Prompt
from oapl_engine.weights.control import Inspect
from oapl_engine.weights.publish import Publisher, publish_paused
from oapl_engine.weights.transports import make_buckets
from tests.live.weights.test_plan_of_vllm_models import EXPERTS, SMALL

pytestmark = [pytest.mark.live, pytest.mark.slow]

WIDE = {**SMALL, "num_attention_heads": 2, "head_dim": 32, "eos_token_id": 1, "bos_token_id": 0}
GEMMA = {"sliding_window": 32, "query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention"]}
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": True}, "memfd", 1),
    "llama untied, tensor parallel 2": ("Llama", {}, "gloo", 2),
    "qwen2": ("Qwen2", {}, "file", 1),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}, "gloo", 1),
    "qwen3 moe": ("Qwen3Moe", EXPERTS, "memfd", 1),
    "gemma 3": ("Gemma3", {"tie_word_embeddings": True, **GEMMA}, "memfd", 1),
}


def make_checkpoint(kind, more, folder, seed):
    import transformers

    torch.manual_seed(seed)
    name = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, name)(**{"tie_word_embeddings": False, **WIDE, **more}, initializer_range=0.3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.2)  # norms and biases differ between versions too
    model.save_pretrained(folder)
    return model


def answers(options, log, vocabulary, update=None):
    """Checksums of the parameters by rank and name, greedy tokens, and what update(control) returned.

    One prompt after another: which prompts share a batch depends on when they arrive, and bfloat16 rounds otherwise.
    """
    with EngineSession(options, log) as session:
        report = update(session.control) if update else None
        checksums = session.control.update(Inspect()).reports
        rng = np.random.default_rng(0)
        prompts = [Prompt(str(i), rng.integers(2, vocabulary, 40).astype(np.int32), "") for i in range(8)]
        how = Sampling(temperature=0, max_new_tokens=24, ignore_stops=True)
        tokens = [session.generate([prompt], 1, how)[0][0].token_ids for prompt in prompts]
    return checksums, tokens, report


def compare(first, second, weights, transport, log, dtype=torch.float32, ranks=1, vocabulary=50):
    """Publish `weights` (those of folder `second`) into an engine on folder `first`; start another on `second`."""
    options = functools.partial(EngineOptions, max_model_len=128, kv_cache_mb=64, tensor_parallel=ranks)
    make = functools.partial(make_buckets, transport, ranks=ranks)

    def update(control):
        publisher = Publisher(weights, control, bucket_bytes=64 << 10, dtype=dtype, make_buckets=make)
        try:
            return publish_paused(publisher, 1)
        finally:
            publisher.close()

    name = str(dtype).removeprefix("torch.")
    live, tokens, report = answers(options(str(first), dtype=name), log, vocabulary, update)
    fresh, expected, _ = answers(options(str(second), dtype=name), log, vocabulary)
    assert live == fresh
    assert tokens == expected
    assert report.changed_share > 0.5
    return sum(map(len, live))


@pytest.mark.parametrize("case", CASES)
def test_a_live_engine_equals_a_fresh_one(case, tmp_path, figure):
    kind, more, transport, ranks = CASES[case]
    before = make_checkpoint(kind, more, tmp_path / "first", 0)
    after = make_checkpoint(kind, more, tmp_path / "second", 1)
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    count = compare(
        tmp_path / "first", tmp_path / "second", after.named_parameters, transport, tmp_path / "log", ranks=ranks
    )
    figure(f"parameters identical, {transport}", count)


def test_smollm2_in_bfloat16_from_float32_masters(tmp_path, figure):
    from transformers import AutoModelForCausalLM

    from oapl_engine.data.model_folder import SMOLLM2, resolve_model

    first = resolve_model(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05 * parameter.std()
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "second")
    count = compare(
        first, tmp_path / "second", model.named_parameters, "memfd", tmp_path / "log", torch.bfloat16, vocabulary=49152
    )
    figure("parameters identical", count)
