"""`oapl sft RECIPE`: a micro Llama made from nothing and warmed up on generated examples, as a Hugging Face folder.

Loss on the answer and its end of sequence only. The same seed and thread count give the same weights.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from oapl_engine.data.micro import BOS, EOS, PAD, VOCABULARY, micro_tokenizer
from oapl_engine.data.task import Task, load_task
from oapl_engine.errors import ConfigError
from oapl_engine.files import follow_umask
from oapl_engine.samples import Prompt
from oapl_engine.sft_config import SftRecipe, load_sft_recipe

IGNORED = -100  # target of positions without loss, as in torch.nn.functional.cross_entropy
POSITIONS = 256  # longest sequence of the model, tokens


def run_sft(recipe: SftRecipe) -> float:
    """Train, save to recipe.model.out, print progress; returns greedy accuracy on the held-out problems.

    Raises ConfigError where the folder holds something else than a model or cannot be written, or a sequence does not
    fit.
    """
    out = Path(recipe.model.out)
    if out.exists() and not (out / "config.json").exists() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"model.out = {out} exists and is not a model folder: choose another folder or remove it")
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    torch.manual_seed(recipe.run.seed)
    tokenizer = micro_tokenizer()
    task = load_task(recipe.data, recipe.run.seed, tokenizer)
    model = micro_llama(recipe)
    try:
        _part(out).mkdir(parents=True, exist_ok=True)  # before the steps: they would be lost
    except OSError as error:
        raise ConfigError(f"model.out = {out}: {error.strerror}; name a folder that you may write") from error
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    print(f"sft: {size}, {task.source.name}, {recipe.train.steps} steps of {recipe.train.batch_size}")
    _train(model, task, tokenizer, recipe)
    accuracy = greedy_accuracy(model, task.held_out, tokenizer)
    _save(model, tokenizer, out)
    print(f"done: steps={recipe.train.steps} greedy={accuracy:.3f} problems={len(task.held_out)} model={out}")
    return accuracy


def make_missing_model(model_path: str, folder: Path) -> None:
    """Where a recipe's model is missing and a warm start in the recipe's folder writes it, make it first."""
    if Path(model_path).exists() or int(os.environ.get("RANK", "0")):  # other ranks wait for the first
        return
    for path in sorted(folder.glob("*sft*.toml")):
        recipe = load_sft_recipe(path)
        if recipe.model.out == model_path:
            print(f"{model_path} is missing: oapl sft {path}", file=sys.stderr)
            run_sft(recipe)
            return


def micro_llama(recipe: SftRecipe) -> LlamaForCausalLM:
    """Llama of the recipe's size, fresh weights from torch's global generator; head tied to the embedding."""
    m, ids = recipe.model, {s: i for i, s in enumerate(VOCABULARY)}
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=m.hidden,
        intermediate_size=3 * m.hidden,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=ids[EOS], pad_token_id=ids[PAD], bos_token_id=ids[BOS])
    return model


def _train(model: LlamaForCausalLM, task: Task, tokenizer: Any, recipe: SftRecipe) -> None:
    steps, size, started = recipe.train.steps, recipe.train.batch_size, time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.train.learning_rate, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for step in range(steps):
        batch = [task.prompt(step * size + i) for i in range(size)]
        token_ids, target = pad_examples(batch, tokenizer)
        logits = model(input_ids=token_ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps} loss {loss.item():.4f} {time.monotonic() - started:.1f} s", flush=True)


def pad_examples(batch: list[Prompt], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """token_ids [B, S] i64, right-padded, and target [B, S-1] i64: the next token where it is answer or eos."""
    answers = [tokenizer.encode(p.record["solution"]) + [tokenizer.eos_token_id] for p in batch]
    length = max(len(p.token_ids) + len(a) for p, a in zip(batch, answers, strict=True))
    if length > POSITIONS:
        raise ConfigError(
            f"an example has {length} tokens, the micro model takes {POSITIONS}: lower data.options.digits"
        )
    token_ids = torch.full((len(batch), length), tokenizer.pad_token_id)
    target = torch.full((len(batch), length), IGNORED)
    for row, (prompt, answer) in enumerate(zip(batch, answers, strict=True)):
        start, end = len(prompt.token_ids), len(prompt.token_ids) + len(answer)
        token_ids[row, :start] = torch.from_numpy(prompt.token_ids)
        token_ids[row, start:end] = torch.tensor(answer)
        target[row, start:end] = token_ids[row, start:end]
    return token_ids, target[:, 1:]


@torch.no_grad()
def greedy_accuracy(model: LlamaForCausalLM, prompts: tuple[Prompt, ...], tokenizer: Any) -> float:
    """Share of prompts whose greedy continuation is the complete solution, token for token."""
    if not prompts:
        return float("nan")
    model.eval()
    token_ids, target = pad_examples(list(prompts), tokenizer)
    # every solution token predicted from the true prefix: by induction, exactly when greedy decoding gives it
    right = (model(input_ids=token_ids).logits[:, :-1].argmax(-1) == target) | (target == IGNORED)
    return float(right.all(-1).double().mean())


def _part(out: Path) -> Path:
    return out.with_name(out.name + ".part")


def _save(model: LlamaForCausalLM, tokenizer: Any, out: Path) -> None:
    """Written under another name, then renamed: a folder that is there is complete."""
    logging.disable_progress_bar()
    part = _part(out)
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    follow_umask(part)
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)
