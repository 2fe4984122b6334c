"""Rollouts drawn with transformers alone: an independent source for offline runs in tests."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oapl_engine.config import DataConfig
from oapl_engine.data.task import load_task


@torch.no_grad()
def write_rollouts(model_dir, path, prompts, group_size, max_new_tokens=8, seed=0):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    task = load_task(DataConfig(source="micro", task="sort", options={"digits": 6}, template="raw"), seed, tokenizer)
    torch.manual_seed(seed)
    with open(path, "w", encoding="utf-8") as file:
        for position in range(prompts):
            prompt = task.prompt(position)
            rows = torch.from_numpy(prompt.token_ids.astype("int64"))[None].repeat(group_size, 1)
            out = model.generate(
                rows, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=max_new_tokens,
                attention_mask=torch.ones_like(rows),
            )  # fmt: skip
            logprob = torch.log_softmax(model(out).logits.float(), -1)
            for sample in range(group_size):
                file.write(json.dumps(_row(out[sample], logprob[sample], prompt, sample, tokenizer)) + "\n")


def _row(ids, logprob, prompt, sample, tokenizer):
    start = len(prompt.token_ids)
    response = ids[start:].tolist()
    if tokenizer.eos_token_id in response:
        response = response[: response.index(tokenizer.eos_token_id) + 1]
    text = tokenizer.decode(response, skip_special_tokens=True)
    return {
        "key": f"0.{prompt.id}.0.{sample}", "prompt_id": prompt.id, "group": f"0.{prompt.id}.0", "sample": sample,
        "version_first": 0, "version_last": 0, "prompt_token_ids": prompt.token_ids.tolist(),
        "response_token_ids": response,
        "behavior_logprobs": [float(logprob[start + i - 1, t]) for i, t in enumerate(response)],
        "reward": float(text == prompt.record["answer"]), "status": "scored", "trained_steps": [],
    }  # fmt: skip
