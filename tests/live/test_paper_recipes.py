"""The paper's recipes and their GRPO twins: same budget, and a few steps on tiny models of the same architecture."""

import dataclasses
import json

import pytest
import torch

from oapl_engine.config import load_recipe
from oapl_engine.data.micro import VOCABULARY, micro_tokenizer
from oapl_engine.report.metrics import read_metrics
from tests.conftest import ROOT

MATH, CODE = "paper_math_qwen3_4b", "paper_code_r1_distill_14b"


def recipe_path(name):
    return ROOT / "recipes" / f"{name}.toml"


def tiny(folder, kind):
    """What vLLM and transformers build for the real one, narrow: grouped queries, q/k norms (Qwen3), biases (Qwen2)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32, tie_word_embeddings=True))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes | {"hidden_size": 128}, tie_word_embeddings=False))
    model.save_pretrained(folder)
    micro_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [MATH, CODE])
def test_the_twin_differs_in_the_objective_alone(name):
    ours, twin = (load_recipe(recipe_path(n)) for n in (name, f"{name}_grpo"))
    different = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(twin, f.name)}
    assert different == {"objective", "run"}  # run: its directory is named after the recipe
    assert (ours.objective.name, twin.objective.name) == ("oapl", "grpo")


def test_the_numbers_of_the_paper():
    math, code = load_recipe(recipe_path(MATH)), load_recipe(recipe_path(CODE))
    assert (math.objective.beta1, math.objective.beta2, math.schedule.lag) == (1.0, 1e-3, 50)
    assert code.schedule.groups_per_step * code.schedule.group_size == 256
    assert (code.schedule.max_uses, code.sampling.temperature, code.sampling.top_p) == (4, 0.6, 0.95)
    o = code.optimizer
    assert (o.learning_rate, o.beta1, o.beta2, o.epsilon, o.weight_decay) == (1e-6, 0.9, 0.95, 1e-10, 1e-8)
    assert (o.warmup_share, o.decay_to, o.clip_norm) == (0.02, 0.05, 1.0)


def train(oapl, name, tmp_path, **fields):
    fields = {
        "run.dir": tmp_path / "run", "run.threads": 1, "schedule.steps": 4, "schedule.groups_per_step": 2,
        "schedule.group_size": 4, "objective.equal_groups": "keep", "train.token_budget": 2048, **fields,
    }  # fmt: skip
    done = oapl("train", recipe_path(name), *(word for k, v in fields.items() for word in (f"--{k}", v)))
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss"] is not None for row in rows)
    return rows


@pytest.mark.live
@pytest.mark.parametrize("name", [MATH, pytest.param(f"{MATH}_grpo", marks=pytest.mark.slow)])
def test_mathematics(oapl, name, tmp_path):
    problems = tmp_path / "problems.jsonl"
    lines = [json.dumps({"question": f"{i}+{i + 1}=", "answer": 2 * i + 1}) for i in range(40)]
    problems.write_text("\n".join(lines))
    fields = {"model.path": tiny(tmp_path / "model", "qwen3"), "data.source": "jsonl", "data.path": problems}
    fields |= {"data.task": "", "data.options": "{}", "data.held_out": 4, "data.max_prompt_tokens": 128}
    rows = train(oapl, name, tmp_path, **fields, **{"sampling.max_new_tokens": 16, "schedule.lag": 2})
    assert [row["policy_version"] for row in rows] == [0, 0, 1, 1]


@pytest.mark.parametrize("name", [CODE, f"{CODE}_grpo"])
def test_code_offline_from_the_authors_columns(oapl, name, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rewards = [1.0, 0.0, 0.0, 1.0]
    rows = [
        {"prompt": f"{i}+{i}=", "response": f"{2 * i + s}", "precomputed_reward": r, "response_rewards": rewards}
        for i in range(4)
        for s, r in enumerate(rewards)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rollouts.parquet")
    fields = {"model.path": tiny(tmp_path / "model", "qwen2"), "data.path": tmp_path / "rollouts.parquet"}
    train(oapl, name, tmp_path, **fields)
