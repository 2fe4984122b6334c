"""Loads a policy from a folder and checks everything before it returns: files, vocabulary, weights, packed rows."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from oapl_engine import config
from oapl_engine.errors import ConfigError
from oapl_engine.trainer import attention
from oapl_engine.trainer.packing_probe import choose_packing_mode
from oapl_engine.trainer.policy import Policy

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# "LoRA Without Regret" (Thinking Machines, 2025): with alpha fixed the best learning rate does not depend on the rank.
LORA_ALPHA = 32


def load_policy(model: config.ModelConfig, train: config.TrainConfig, device: torch.device | None = None) -> Policy:
    """The policy of a recipe on `device` (default: this rank's GPU if there is one, else the CPU), ready to train.

    Everything is checked before it returns: files, vocabulary, weights, precision, and that packed rows give the
    model's own log-probs; packing modes that do not are given up, and the reason is logged. Raises ConfigError.
    """
    device = device or default_device()
    matmul_dtype = _matmul_dtype(model, train, device)
    kernel = attention.attention_kernel(model.attention, device, matmul_dtype)
    network = _load_network(model)
    tokenizer = load_tokenizer(model.path)
    _check_weights(network, len(tokenizer), model.path)
    if model.lora_rank:
        lora = LoraConfig(r=model.lora_rank, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        network = inject_adapter_in_model(lora, network)
    policy = Policy(network.to(device).eval(), tokenizer, device, matmul_dtype, kernel)
    with silence_transformers():
        choose_packing_mode(policy)
    _prepare_training(policy, train)
    return policy


def default_device() -> torch.device:
    """This rank's GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _matmul_dtype(model: config.ModelConfig, train: config.TrainConfig, device: torch.device) -> torch.dtype:
    if model.dtype == "bfloat16":
        if train.precision == "float32":
            raise ConfigError('train.precision = "float32" with model.dtype = "bfloat16": set model.dtype = "float32"')
        return torch.bfloat16
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if train.precision == "bfloat16" and device.type == "cuda" and not able:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f'train.precision = "bfloat16": {name} has no bfloat16; use "float32" or "auto"')
    return torch.bfloat16 if train.precision == "bfloat16" or (train.precision == "auto" and able) else torch.float32


def _refused(path: str, why: str) -> ConfigError:
    return ConfigError(f'model.path = "{path}"{why}')


def _load_network(model: config.ModelConfig) -> PreTrainedModel:
    path = model.path
    if Path(path).is_dir() and not Path(path, "config.json").exists():
        raise _refused(path, " has no config.json: name a folder in Hugging Face layout")
    try:
        settings = AutoConfig.from_pretrained(path)
    except Exception as error:  # OSError, ValueError, KeyError, and what the checks of a config class raise
        raise _refused(path, f" cannot be loaded: {error}") from error
    _check_architecture(settings, path)
    _check_files(Path(path))
    try:
        with silence_transformers():
            network, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=DTYPES[model.dtype], attn_implementation="eager", output_loading_info=True
            )
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, and what modelling files raise
        raise _refused(path, f" cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise _refused(path, f" lacks {len(missing)} weights, among them {missing[0]}: incomplete")
    network.config.use_cache = False
    for parameter in network.parameters():
        # Memory mapped from a file is aligned at random, and a matmul's last bits depend on alignment.
        parameter.data = parameter.data.clone()
    return network


def _check_architecture(settings: Any, path: str) -> None:
    if settings.model_type not in CAUSAL_LMS:
        raise _refused(path, f": {settings.model_type} is not a causal LM in transformers")
    known = {name for names in CAUSAL_LMS.values() for name in ((names,) if isinstance(names, str) else names)}
    named = settings.architectures or []
    if named and not known & set(named):
        raise _refused(path, f" holds {named[0]}, not a causal LM: name a …ForCausalLM model")


def _check_files(path: Path) -> None:
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else ():
        try:
            safe_open(file, "pt").__enter__()
        except SafetensorError as error:
            raise ConfigError(f"weights {file} are damaged or truncated ({error}): fetch the model again") from error


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Without transformers' progress bars and load report: what matters in it is an error of ours."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def load_tokenizer(path: str) -> Any:
    """The tokenizer in a model's folder. Raises ConfigError."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refused(path, " has no tokenizer: add tokenizer.json and tokenizer_config.json") from error


def read_text_config(path: str) -> dict[str, Any]:
    """Fields of the text part of a model's config; `vocab_size`: rows of its head. Raises ConfigError."""
    try:
        fields: dict[str, Any] = AutoConfig.from_pretrained(path).get_text_config().to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise _refused(path, f" cannot be loaded: {error}") from error
    return fields


def _check_weights(network: PreTrainedModel, tokens: int, path: str) -> None:
    output = network.get_output_embeddings()
    if output is None:
        raise _refused(
            path, f": {type(network).__name__} has no output embeddings, the head that tokens are drawn from"
        )
    rows = len(output.weight)
    if tokens > rows:
        raise _refused(
            path,
            f": the tokenizer has {tokens} tokens but the head only {rows} rows; use the model's own tokenizer, or "
            "resize the model's embeddings",
        )
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise _refused(path, f": weight {name} holds NaN or Inf; fetch or train the model again")


def _prepare_training(policy: Policy, train: config.TrainConfig) -> None:
    network, name = policy.model, type(policy.model).__name__
    # Log-probs are compared with the engine's, which has neither dropout nor noise in a router.
    network.eval()
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if train.checkpoint_activations:
        if not network.supports_gradient_checkpointing:
            raise ConfigError(f"train.checkpoint_activations: {name} cannot; set it to false")
        kept = {"use_reentrant": False, "context_fn": attention.keep_plan}
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept)
        for layer in layers:
            _checkpoint_without_dropout(layer)
    if train.compile:
        for layer in layers:
            layer.compile(dynamic=True)


def _checkpoint_without_dropout(layer: GradientCheckpointingLayer) -> None:
    layer.training = True  # of the layer itself, not of the modules inside it: without, it does not checkpoint
    for name, value in vars(layer).items():
        if "dropout" in name and isinstance(value, float):
            setattr(layer, name, 0.0)
