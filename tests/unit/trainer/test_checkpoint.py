"""Checkpoints: bit-identical resume, damage named and never used, nothing overwritten, half-written ones invisible."""

import logging
import shutil

import pytest
import torch
from oapl_kernels.objectives import oapl
from transformers import AutoModelForCausalLM

from oapl_engine import config
from oapl_engine.trainer import checkpoint
from oapl_engine.trainer.checkpoint import CheckpointError, load_newest, restore, resume_policy, save, weight_hash
from oapl_engine.trainer.loading import load_policy
from oapl_engine.trainer.optimizer import make_optimizer
from oapl_engine.trainer.packing import pack
from oapl_engine.trainer.policy import published_weights
from oapl_engine.trainer.step import train_step

TRAIN = config.TrainConfig(precision="float32")
OPTIMIZER = config.OptimizerConfig(learning_rate=1e-3)


def train(policy, optimizer, groups, steps):
    for number in steps:
        items = groups.items([groups.make(number, 20, [9, 4, 6])])
        objective, rate = oapl(beta2=0.1), 1e-3 / (1 + number)
        train_step(policy, optimizer, pack(items, 100, True), objective, learning_rate=rate, normalizer=3.0)


@pytest.fixture
def fresh(model_folder):
    """fresh(rank): recipe section, policy and optimizer on the same start weights."""
    folder = model_folder("llama_tied")

    def make(rank=0):
        torch.manual_seed(3)
        model = config.ModelConfig(path=str(folder), lora_rank=rank)
        policy = load_policy(model, TRAIN, torch.device("cpu"))
        return model, policy, make_optimizer(policy, OPTIMIZER)

    return make


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_resume_is_bit_identical(rank, fresh, groups, tmp_path):
    """Six steps, and three steps + save + a new process's load + three steps: the same weights, bit for bit."""
    _, policy, optimizer = fresh(rank)
    train(policy, optimizer, groups, range(6))
    expected = weight_hash(policy.model)

    model, policy, optimizer = fresh(rank)
    train(policy, optimizer, groups, range(3))
    save(tmp_path, 3, policy, optimizer, {"position": 12}, keep=2)
    noise = torch.rand(3)
    torch.manual_seed(99)
    found = load_newest(tmp_path)
    assert (found.step, found.extra, found.weight_hash) == (3, {"position": 12}, weight_hash(policy.model))
    policy = resume_policy(found, model, TRAIN, torch.device("cpu"))
    optimizer = make_optimizer(policy, OPTIMIZER)
    restore(found, policy, optimizer)
    assert torch.equal(torch.rand(3), noise)
    train(policy, optimizer, groups, range(3, 6))
    assert weight_hash(policy.model) == expected


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_folder_is_what_transformers_loads(rank, fresh, groups, tmp_path):
    """The folder loads without us, LoRA merged, and gives the policy's own logits; state lies out of vLLM's sight."""
    _, policy, optimizer = fresh(rank)
    train(policy, optimizer, groups, range(2))
    folder = save(tmp_path, 2, policy, optimizer, {}, keep=1)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(5, 25)[None]
    policy.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(loaded(ids).logits, policy.model(ids).logits, atol=1e-5, rtol=1e-5)
    assert {p.name for p in folder.glob("*.safetensors")} == {"model.safetensors"}
    assert {p.name for p in folder.glob("*.json")} >= {"config.json", "tokenizer.json", "generation_config.json"}
    served = dict(published_weights(policy))
    assert served.keys() == {n for n, _ in loaded.named_parameters()}


@pytest.fixture
def two(fresh, groups, tmp_path):
    """Checkpoints of steps 1 and 2."""
    _, policy, optimizer = fresh()
    for number in (1, 2):
        train(policy, optimizer, groups, [number])
        save(tmp_path, number, policy, optimizer, {"number": number}, keep=5)
    return tmp_path, policy, optimizer


FILES = ["model.safetensors", "config.json", "trainer/optimizer.safetensors", "trainer/extra.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_not_used(file, damage, two, caplog):
    """A flipped bit, a truncation or a missing file: named, and the older checkpoint is used."""
    path = two[0] / "step_000002" / file
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-7])
    with caplog.at_level(logging.WARNING):
        assert load_newest(two[0]).extra == {"number": 1}
    assert str(path) in caplog.text
    shutil.rmtree(two[0] / "step_000001")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*step_000002"):
        load_newest(two[0])


def test_never_overwritten(two, groups):
    """The same weights again: left as they are. Other weights of that step: refused. A damaged folder: moved aside."""
    directory, policy, optimizer = two
    before = (directory / "step_000002" / "manifest.json").stat().st_mtime_ns
    save(directory, 2, policy, optimizer, {}, keep=5)
    assert (directory / "step_000002" / "manifest.json").stat().st_mtime_ns == before
    train(policy, optimizer, groups, [3])
    with pytest.raises(CheckpointError, match="step_000002 holds other weights of the same step"):
        save(directory, 2, policy, optimizer, {}, keep=5)
    (directory / "step_000002" / "config.json").write_text("{}")
    save(directory, 2, policy, optimizer, {"again": True}, keep=5)
    assert load_newest(directory).extra == {"again": True}
    assert (directory / "step_000002.damaged-0" / "config.json").read_text() == "{}"


def test_keeps_the_newest(two):
    """keep = 1 leaves the newest; step 10 is newer than step 9."""
    directory, policy, optimizer = two
    for number in (9, 10):
        save(directory, number, policy, optimizer, {}, keep=1)
    assert [p.name for p in directory.glob("*") if p.name.startswith(("step", ".tmp"))] == ["step_000010"]


@pytest.mark.parametrize("where", ["_write_files", "_write_manifest", "_sync"])
def test_full_disk_and_kills_leave_the_earlier_ones(where, two, groups, monkeypatch):
    """ENOSPC anywhere: a clear error. What a kill leaves is invisible, and gone after the next save."""
    directory, policy, optimizer = two
    train(policy, optimizer, groups, [3])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, full)
        with pytest.raises(CheckpointError, match=r"step_000003 cannot be written: .*No space left .* free disk space"):
            save(directory, 3, policy, optimizer, {}, keep=5)
    assert load_newest(directory).step == 2
    (directory / ".tmp-step_000003").mkdir(exist_ok=True)
    (directory / ".tmp-step_000003" / "model.safetensors").write_bytes(b"half")
    assert load_newest(directory).step == 2
    save(directory, 3, policy, optimizer, {}, keep=5)
    assert load_newest(directory).step == 3
    assert not list(directory.glob(".tmp*"))


def test_none_there(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "missing") is None


def test_state_of_another_model(two, make_policy):
    policy = make_policy("qwen2")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors belongs to another model"):
        restore(load_newest(two[0]), policy, make_optimizer(policy, OPTIMIZER))


def test_weight_hash(make_policy):
    """Equal for equal weights; one bit of one weight, or two weights swapped, change it."""
    one, other = make_policy().model, make_policy().model
    assert weight_hash(one) == weight_hash(other)
    weight = next(other.parameters()).data
    weight.view(torch.int32)[3, 3] ^= 1
    assert weight_hash(one) != weight_hash(other)
    norms = [layer.input_layernorm.weight for layer in one.model.layers]
    before = weight_hash(one)
    norms[0].data, norms[1].data = norms[1].data, norms[0].data
    assert weight_hash(one) != before


def test_files_of_a_checkpoint_follow_umask(two):
    """A server that runs as another user loads the weights; safetensors alone would forbid it."""
    directory, _, _ = two
    plain = directory / "plain"
    plain.touch()
    rights = {path.stat().st_mode & 0o777 for path in (directory / "step_000002").rglob("*") if path.is_file()}
    assert rights == {plain.stat().st_mode & 0o777}
