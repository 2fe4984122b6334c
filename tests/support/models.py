"""Tiny random models, as networks and as folders in Hugging Face layout."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama_tied": lambda: LlamaConfig(tie_word_embeddings=True, **SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(head_dim=8, **SIZES),
    # both softcaps, and a window shorter than the sequences
    "gemma2": lambda: Gemma2Config(head_dim=8, sliding_window=9, **SIZES),
}


def make_network(name, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(CONFIGS[name]())
        for parameter in network.parameters():
            # Larger than the usual 0.02: log-probs far from uniform, gradients everywhere.
            parameter.data.normal_(0, 0.1) if parameter.dim() > 1 else parameter.data.normal_(1, 0.1)
    network.tie_weights()
    return network.to(dtype)


def save_model_folder(folder, name="llama", words=60):
    """A folder in Hugging Face layout: a tiny model of CONFIGS with a word-level tokenizer."""
    make_network(name).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder


def make_served_llama(folder, tied):
    """A random Llama that vLLM's CPU attention serves: hidden 64, 3 layers, 2 heads of 32, vocabulary 48, eos 1."""
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
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model
