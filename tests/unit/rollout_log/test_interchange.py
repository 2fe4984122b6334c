"""Offline rollouts: both formats read as written, and every bad row is an error that names file and line."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from oapl_engine.errors import ConfigError
from oapl_engine.rollout_log.interchange import Limits, read_rollouts

LIMITS = Limits(vocabulary=97, max_new_tokens=16, ends=(2,), group_size=2)


def row(sample=0, **fields):
    good = {
        "key": f"0.p.0.{sample}",
        "prompt_id": "p",
        "group": "0.p.0",
        "sample": sample,
        "version_first": 3,
        "version_last": 4,
        "prompt_token_ids": [5, 6],
        "response_token_ids": [7, 8, 2],
        "behavior_logprobs": [-1.0, -0.5, 0.0],
        "reward": 1.0,
        "status": "scored",
        "trained_steps": [],
    }
    return good | fields


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_our_export(kind, tmp_path):
    rows = [row(0), row(1, response_token_ids=[9], behavior_logprobs=[-2.0], reward=0.0)]
    rows.append(row(2, status="invalid", reward=None))
    found = read_rollouts(write(tmp_path / f"r.{kind}", rows), LIMITS)
    (group,) = found.groups
    assert (group.id, group.version, found.has_behavior) == ("0.p.0", 3, True)
    first, second, third = group.rollouts
    assert first.token_ids.tolist() == [5, 6, 7, 8, 2]
    assert first.loss_mask.tolist() == [0, 0, 1, 1, 1]
    assert first.behavior_logprob.tolist() == [0, 0, -1, -0.5, 0]
    assert (first.finish, second.finish, first.reward, third.reward) == ("stop", "length", 1.0, None)
    assert len(group.scored()) == 2


def test_stop_is_eos_by_default(model_folder, tmp_path):
    """A recipe without stop_token_ids means the tokenizer's eos (2 here), as for the engine."""
    path = write(tmp_path / "r.jsonl", [row(0), row(1, response_token_ids=[9], behavior_logprobs=[-2.0])])
    found = read_rollouts(path, Limits(97, 16, (), 1), AutoTokenizer.from_pretrained(model_folder()))
    assert [r.finish for r in found.groups[0].rollouts] == ["stop", "length"]


def test_recomputed_and_turns(tmp_path):
    """null log-probs are read, and told; an optional loss_mask leaves tool tokens out, whose log-probs may be null."""
    turns = {"loss_mask": [1, 0, 1], "behavior_logprobs": [-1.0, None, -3.0]}
    found = read_rollouts(write(tmp_path / "r.jsonl", [row(0, **turns), row(1, behavior_logprobs=None)]), LIMITS)
    assert not found.has_behavior
    assert found.groups[0].rollouts[0].behavior_logprob.tolist() == [0, 0, -1, 0, -3]
    assert found.groups[0].rollouts[0].loss_mask.tolist() == [0, 0, 1, 0, 1]


BAD = {
    "zero tokens": (
        {"response_token_ids": [], "behavior_logprobs": []},
        r"rollout 0\.p\.0\.1 has zero response tokens",
    ),
    "no prompt": ({"prompt_token_ids": []}, r"rollout 0\.p\.0\.1 has zero prompt tokens"),
    "log-prob missing": ({"behavior_logprobs": [-1.0, None, 0.0]}, r"behavior_logprobs\[1\] = None; .*recomputed"),
    "log-prob NaN": ({"behavior_logprobs": [-1.0, math.nan, 0.0]}, r"behavior_logprobs\[1\] = nan"),
    "log-prob positive": ({"behavior_logprobs": [-1.0, 0.5, 0.0]}, r"behavior_logprobs\[1\] = 0\.5; a log-prob is"),
    "log-probs short": ({"behavior_logprobs": [-1.0]}, r"behavior_logprobs must be 3 numbers"),
    "token out of range": ({"response_token_ids": [7, 97, 2]}, r"response_token_ids holds 97; .* 0 to 96"),
    "token negative": ({"prompt_token_ids": [-1]}, r"prompt_token_ids holds -1"),
    "token text": ({"response_token_ids": ["7"]}, r"response_token_ids must be a list of integers"),
    "versions swapped": ({"version_first": 5}, r"version_first = 5, version_last = 4"),
    "reward NaN": ({"reward": math.nan}, r"reward = nan; a scored rollout needs a finite number"),
    "reward infinite": ({"reward": math.inf}, r"reward = inf"),
    "reward None": ({"reward": None}, r"reward = None"),
    "reward text": ({"reward": "1"}, r"reward = '1'"),
    "unknown status": ({"status": "fine"}, r'status = "fine" is not one of scored'),
    "same key": ({"key": "0.p.0.0"}, r"key 0\.p\.0\.0 is there twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case, tmp_path):
    fields, message = BAD[case]
    path = write(tmp_path / "r.jsonl", [row(0), row(1, **fields)])
    with pytest.raises(ConfigError, match=f"r.jsonl line 2: {message}"):
        read_rollouts(path, LIMITS)


def test_bad_files(tmp_path):
    def fails(path, message):
        with pytest.raises(ConfigError, match=message):
            read_rollouts(path, LIMITS)

    fails(tmp_path / "none.jsonl", r"none\.jsonl: does not exist; name a file")
    fails(tmp_path, "is a directory")
    fails(write(tmp_path / "r.txt", []), 'unknown kind ".txt"')
    fails(write(tmp_path / "empty.jsonl", []), "the file is empty")
    (tmp_path / "broken.jsonl").write_text(json.dumps(row()) + '\n{"key": \n')
    fails(tmp_path / "broken.jsonl", r"broken\.jsonl line 2 is not JSON")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    fails(tmp_path / "list.jsonl", "line 1 is a JSON list: write one object per line")
    fails(write(tmp_path / "short.jsonl", [row(0)]), r"group 0\.p\.0 has 1 rollouts, schedule\.group_size = 2")
    second = {k: v for k, v in row(1).items() if k != "reward"}
    fails(write(tmp_path / "field.jsonl", [row(0), second]), "line 2: field reward is missing")
    (tmp_path / "text.parquet").write_text("no")
    fails(tmp_path / "text.parquet", "is damaged or not a Parquet file")
    fails(write(tmp_path / "other.parquet", [{"question": "?"}]), r"columns question; wanted are key, .* or prompt,")


def authors(**fields):
    return {"prompt": "w1 w2", "response": "w3 w4", "precomputed_reward": 1.0, "response_rewards": [1.0, 0.0]} | fields


def test_authors_parquet(model_folder, tmp_path):
    """Text is tokenised, the stop token added, rows of one prompt form a group, all recorded rewards are kept."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    long = " ".join(["w5"] * 20)
    chat = [{"role": "user", "content": "w9"}]
    rows = [authors(), authors(response=long, precomputed_reward=0.0), authors(prompt="w7")]
    found = read_rollouts(write(tmp_path / "a.parquet", rows), LIMITS, tokenizer)
    one, two = found.groups
    assert not found.has_behavior
    assert one.rollouts[0].token_ids.tolist() == [4, 5, 6, 7, 2]
    assert [r.finish for r in one.rollouts] == ["stop", "length"]
    assert one.rollouts[1].response_tokens == 16
    assert [r.key for r in one.rollouts] == [f"{one.id}.0", f"{one.id}.1"]
    assert len(two.rollouts) == 1
    np.testing.assert_array_equal(found.recorded_rewards[two.id], [1.0, 0.0])
    path = write(tmp_path / "chat.parquet", [authors(prompt=chat)])
    with pytest.raises(ConfigError, match=r"row 1: prompt is a chat but the tokenizer has no chat template"):
        read_rollouts(path, LIMITS, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} w0"
    assert read_rollouts(path, LIMITS, tokenizer).groups[0].prompt.token_ids.tolist() == [12, 3]
    for field, value in (("precomputed_reward", math.nan), ("response_rewards", [1.0, None]), ("response", "")):
        with pytest.raises(ConfigError, match=rf"bad\.parquet row 1: {field}"):
            read_rollouts(write(tmp_path / "bad.parquet", [authors(**{field: value})]), LIMITS, tokenizer)
