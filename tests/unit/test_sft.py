"""The supervised warm start."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oapl_engine.config import DataConfig, RunConfig
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.data.task import load_task
from oapl_engine.errors import ConfigError
from oapl_engine.samples import Prompt
from oapl_engine.sft import IGNORED, greedy_accuracy, pad_examples, run_sft
from oapl_engine.sft_config import MicroModelConfig, SftRecipe, SftTrainConfig, load_sft_recipe
from tests.conftest import ROOT


def recipe(out, steps=6, digits=3) -> SftRecipe:
    return SftRecipe(
        run=RunConfig(threads=1),
        model=MicroModelConfig(out=str(out)),
        data=DataConfig(source="micro", task="sort", options={"digits": digits}, template="raw", held_out=8),
        train=SftTrainConfig(steps=steps, batch_size=8),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sft") / "micro"
    run_sft(recipe(out))
    return out


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_saved_folder_loads_in_transformers_as_described(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 162_240
    assert model.config.head_dim == 32
    assert model.config.vocab_size == len(tokenizer) == 32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_same_seed_gives_the_same_weights(folder, tmp_path):
    run_sft(recipe(tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(folder)
    run_sft(recipe(tmp_path / "longer", steps=7))
    assert weights(tmp_path / "longer") != weights(folder)


def test_training_lowers_the_loss(tmp_path, capsys):
    run_sft(recipe(tmp_path / "micro", steps=40, digits=2))
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(losses) == 2
    assert losses[1] < losses[0] < np.log(32)


def test_loss_covers_the_answer_and_its_end_only():
    tokenizer = micro_tokenizer()
    texts = [("31>", "13"), ("9>", "9")]
    prompts = [Prompt(q, np.asarray(tokenizer.encode(q), np.int32), "sort", {"solution": a}) for q, a in texts]
    token_ids, target = pad_examples(prompts, tokenizer)
    assert (token_ids.shape, target.shape) == ((2, 6), (2, 5))
    for row, (question, answer) in enumerate(texts):
        trained = target[row][target[row] != IGNORED].tolist()
        assert tokenizer.decode(trained) == answer + "<eos>"
        first = (target[row] != IGNORED).nonzero()[0].item()
        assert first == len(question) - 1


def test_greedy_accuracy_is_that_of_greedy_decoding(tmp_path):
    run_sft(recipe(tmp_path / "micro", steps=40, digits=2))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "micro"), micro_tokenizer()
    task = load_task(dataclasses.replace(recipe("").data, options={"digits": 2}, held_out=40), 0, tokenizer)
    ids = torch.tensor(np.stack([p.token_ids for p in task.held_out])).long()
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)[:, ids.shape[1] :]
    right = [tokenizer.decode(n) == p.record["answer"] + "<eos>" for n, p in zip(new, task.held_out, strict=True)]
    assert 0 < sum(right) < len(right)
    assert greedy_accuracy(model, task.held_out, tokenizer) == sum(right) / len(right)


def test_a_folder_with_other_files_is_not_written_over(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not a model folder"):
        run_sft(recipe(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named_at_the_start(tmp_path, capsys):
    """Before the steps, whose work would be lost."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"model\.out = .*/file/micro: Not a directory"):
        run_sft(recipe(tmp_path / "file" / "micro"))
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize("field", ["run.dir", "data.path"])
def test_a_field_that_a_warm_start_does_not_read_is_refused(field):
    with pytest.raises(ConfigError, match=f"{field} = 'x' has no effect in oapl sft"):
        load_sft_recipe(ROOT / "recipes" / "micro_sft.toml", [f"--{field}", "x"])


def test_an_example_longer_than_the_model_is_named(tmp_path):
    long = dataclasses.replace(recipe(tmp_path / "m").data, template="#" * 250 + "{question}")
    with pytest.raises(ConfigError, match="258 tokens, the micro model takes 256"):
        run_sft(dataclasses.replace(recipe(tmp_path / "m"), data=long))


def test_files_of_the_model_follow_umask(tmp_path):
    run_sft(recipe(tmp_path / "micro", steps=1, digits=2))
    (tmp_path / "plain").touch()
    rights = {path.stat().st_mode & 0o777 for path in (tmp_path / "micro").iterdir()}
    assert rights == {(tmp_path / "plain").stat().st_mode & 0o777}
