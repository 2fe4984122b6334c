"""Plans recorded from vLLM's own models, replayed onto poisoned parameters, equal its load_weights bit for bit."""

import pytest
import torch

from oapl_engine.weights.control import TensorEntry
from oapl_engine.weights.receiver.plan import PlanError, live_parameters, record

pytestmark = pytest.mark.live

SMALL = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
MODELS = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """vLLM's distributed state for one CPU rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    store = f"file://{tmp_path_factory.mktemp('store')}/rendezvous"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, store, 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def checkpoint(kind, more, folder):
    import transformers

    torch.manual_seed(0)
    shape = more if kind == "Mamba" else {"tie_word_embeddings": False, **SMALL, **more}
    config = getattr(transformers, f"{kind}Config")(**shape)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(folder)
    return dict(model.named_parameters())


def build(folder):
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    config = VllmConfig(
        model_config=ModelConfig(str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=64)
    )
    with set_current_vllm_config(config):
        model = initialize_model(config)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_replay_equals_load_weights(one_rank, tmp_path, name):
    weights = checkpoint(*MODELS[name], tmp_path)
    ours, theirs = build(tmp_path), build(tmp_path)
    plan = record(ours, [TensorEntry(n, "float32", list(t.shape)) for n, t in weights.items()])
    live = dict(live_parameters(ours).values())
    with torch.no_grad():
        for region, value in plan.padding:
            region.view(live[region.name]).fill_(value)
        for source, pairs in plan.copies.items():
            for to, at in pairs:
                to.view(live[to.name]).copy_(at.view(weights[source]))
        theirs.load_weights(weights.items())
    for (parameter, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), parameter


def test_a_parameter_computed_while_loading_is_refused(one_rank, tmp_path):
    """vLLM's Mamba stores A = -exp(A_log): a copy of what the trainer sends would be wrong."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 1, "time_step_rank": 4}
    weights = checkpoint("Mamba", sizes, tmp_path)
    model = build(tmp_path)
    with pytest.raises(PlanError, match="expected to reach the model unchanged, found a computed tensor") as refusal:
        record(model, [TensorEntry(n, "float32", list(t.shape)) for n, t in weights.items()])
    assert refusal.value.parameter.endswith("mixer.A_log")
