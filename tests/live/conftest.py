"""A random micro Llama as a checkpoint."""

import pytest


@pytest.fixture(scope="session")
def micro_checkpoint(tmp_path_factory):
    """Folder of a Llama with hidden 64, 3 layers, 2 heads of 32, vocabulary 48, untied head, eos 1."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("micro")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
