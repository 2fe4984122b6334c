"""`oapl doctor --weights` compares a live engine after a publish with one that loads the same checkpoint."""

import re

import pytest
import torch

from oapl_engine import doctor


@pytest.mark.parametrize(("folder", "words"), [("nowhere", "nowhere is not a folder"), ("empty", "config.json")])
def test_a_folder_without_a_model_is_bad_input(refused, tmp_path, folder, words):
    (tmp_path / "empty").mkdir()
    refused(words, "doctor", "--weights", tmp_path / folder)


@pytest.mark.live
@pytest.mark.slow
def test_identical_weights_are_said_in_the_last_line(oapl, micro_model):
    done = oapl("doctor", "--weights", micro_model)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"weights: identical \(\d+ parameters, \d+ seconds\)", done.stdout.splitlines()[-1])


@pytest.mark.live
@pytest.mark.slow
def test_one_element_that_differs_is_found_and_named(micro_model, monkeypatch):
    published = doctor.publish_perturbed

    def publish_then_drift(policy, control):
        published(policy, control)
        with torch.no_grad():
            policy.model.model.layers[1].mlp.down_proj.weight[3, 3] += 1e-3

    monkeypatch.setattr(doctor, "publish_perturbed", publish_then_drift)
    difference = doctor.check_weights(str(micro_model))
    assert difference.startswith("model.layers.1.mlp.down_proj.weight in rank 0 of the live engine differs")
