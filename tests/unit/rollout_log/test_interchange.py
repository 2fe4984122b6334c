"""Offline rollouts: both formats read as written, and every bad row is an error that names file and line."""

import gzip
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.errors import ConfigError
from oapl_engine.rollout_log.export import export_rollouts
from oapl_engine.rollout_log.interchange import Limits, read_rollouts
from oapl_engine.rollout_log.log import RolloutLog
from tests.support.rollouts import plain_group, random_group

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


def fails(path, message, tokenizer=None):
    with pytest.raises(ConfigError, match=message):
        read_rollouts(path, LIMITS, tokenizer)


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


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_export_is_read_back_as_it_was(kind, tmp_path):
    """Tool tokens stay out of the loss, and a response that was cut stays cut, whatever its last token is."""
    groups = [
        random_group(0, 4, [6, 7, 9], turns=True, finishes=["stop", "length", "abort"]),
        plain_group("1"),
        plain_group("2", status="invalid"),
    ]
    log = RolloutLog(tmp_path / "rollouts" / "rank0.sqlite")
    for group in groups:
        log.append(group)
    rows = list(export_rollouts(tmp_path))
    assert [r["loss_mask"] for r in rows[2:4]] == [[1, 1, 1, 0, 0, 0, 1, 1, 1], None]
    found = read_rollouts(write(tmp_path / f"r.{kind}", rows), LIMITS).groups
    for before, after in zip(groups, found, strict=True):
        assert (before.id, before.version, before.prompt.id) == (after.id, after.version, after.prompt.id)
        for old, new in zip(before.rollouts, after.rollouts, strict=True):
            for name in ("token_ids", "loss_mask", "behavior_logprob"):
                np.testing.assert_array_equal(getattr(old, name), getattr(new, name), name)
            for name in ("key", "sample", "prompt_length", "finish", "status", "reward"):
                assert getattr(old, name) == getattr(new, name), name


def test_finish_is_what_the_row_says_else_the_last_token_tells(tmp_path):
    one = {"behavior_logprobs": [-2.0]}
    rows = [
        row(0),
        row(1, finish="length"),
        row(2, response_token_ids=[30], **one),
        row(3, response_token_ids=[9], **one),
        row(4, response_token_ids=[9], finish="stop", **one),
    ]
    found = read_rollouts(write(tmp_path / "r.jsonl", rows), Limits(97, 16, (2, 30), 2))
    assert [r.finish for r in found.groups[0].rollouts] == ["stop", "length", "stop", "length", "stop"]


def test_recomputed_and_turns(tmp_path):
    """null log-probs are read, and told; an optional loss_mask leaves tool tokens out, whose log-probs may be null."""
    turns = {"loss_mask": [1, 0, 1], "behavior_logprobs": [-1.0, None, -3.0]}
    found = read_rollouts(write(tmp_path / "r.jsonl", [row(0, **turns), row(1, behavior_logprobs=None)]), LIMITS)
    assert not found.has_behavior
    assert found.groups[0].rollouts[0].behavior_logprob.tolist() == [0, 0, -1, 0, -3]
    assert found.groups[0].rollouts[0].loss_mask.tolist() == [0, 0, 1, 0, 1]
    flags = write(tmp_path / "flags.jsonl", [row(0, loss_mask=[True, False, True]), row(1, loss_mask=[1.0, 0.0, 1.0])])
    assert [r.loss_mask.tolist() for r in read_rollouts(flags, LIMITS).groups[0].rollouts] == 2 * [[0, 0, 1, 0, 1]]


BAD = {
    "zero tokens": (
        {"response_token_ids": [], "behavior_logprobs": []},
        r"rollout 0\.p\.0\.1 has zero response tokens",
    ),
    "no prompt": ({"prompt_token_ids": []}, r"rollout 0\.p\.0\.1 has zero prompt tokens"),
    "log-prob missing": ({"behavior_logprobs": [-1.0, None, 0.0]}, r"behavior_logprobs\[1\] = None; .*recomputed"),
    "log-prob NaN": ({"behavior_logprobs": [-1.0, math.nan, 0.0]}, "NaN is not a JSON value"),
    "log-prob infinite": ({"behavior_logprobs": [-1.0, -math.inf, 0.0]}, "-Infinity is not a JSON value"),
    "log-prob beyond float32": ({"behavior_logprobs": [-1.0, -1e300, 0.0]}, r"behavior_logprobs\[1\] = -1e\+300"),
    "log-prob of 400 digits": ({"behavior_logprobs": [-1.0, -(10**400), 0.0]}, "behavior_logprobs: .*too large"),
    "log-prob false": ({"behavior_logprobs": [-1.0, False, 0.0]}, "behavior_logprobs must be 3 numbers"),
    "log-prob text": ({"behavior_logprobs": [-1.0, "-1.0", 0.0]}, "behavior_logprobs must be 3 numbers"),
    "log-prob positive": ({"behavior_logprobs": [-1.0, 0.5, 0.0]}, r"behavior_logprobs\[1\] = 0\.5; a log-prob is"),
    "log-probs short": ({"behavior_logprobs": [-1.0]}, r"behavior_logprobs must be 3 numbers"),
    "token out of range": ({"response_token_ids": [7, 97, 2]}, r"response_token_ids holds 97; .* 0 to 96"),
    "token negative": ({"prompt_token_ids": [-1]}, r"prompt_token_ids holds -1"),
    "token beyond 64 bits": ({"response_token_ids": [7, 2**70, 2]}, f"response_token_ids holds {2**70}"),
    "token text": ({"response_token_ids": ["7"]}, r"response_token_ids must be a list of integers"),
    "token true": ({"response_token_ids": [7, True, 2]}, r"response_token_ids must be a list of integers"),
    "token fraction": ({"prompt_token_ids": [5, 6.5]}, r"prompt_token_ids must be a list of integers"),
    "mask short": ({"loss_mask": [1]}, "loss_mask must be 3 numbers that are 0 or 1"),
    "mask of weights": ({"loss_mask": [1, 0.5, 1]}, "loss_mask must be 3 numbers that are 0 or 1"),
    "mask with null": ({"loss_mask": [1, None, 1]}, "loss_mask must be 3 numbers that are 0 or 1"),
    "mask nested": ({"loss_mask": [[1], [1], [1]]}, "loss_mask must be 3 numbers that are 0 or 1"),
    "versions swapped": ({"version_first": 5}, r"version_first = 5, version_last = 4"),
    "version true": ({"version_first": True}, "version_first = True must be a whole number"),
    "version beyond 64 bits": ({"version_last": 2**63}, f"version_last = {2**63} must be a whole number"),
    "reward NaN": ({"reward": math.nan}, "NaN is not a JSON value"),
    "reward infinite": ({"reward": math.inf}, "Infinity is not a JSON value"),
    "reward of 400 digits": ({"reward": 10**400}, "reward = 10*; a scored rollout needs a finite number"),
    "reward None": ({"reward": None}, r"reward = None"),
    "reward text": ({"reward": "1"}, r"reward = '1'"),
    "reward true": ({"reward": True}, r"reward = True; a scored rollout needs a finite number"),
    "unknown status": ({"status": "fine"}, r'status = "fine" is not one of scored'),
    "unknown finish": ({"finish": "eos"}, r'finish = "eos" is not one of stop'),
    "same key": ({"key": "0.p.0.0", "sample": 0}, r"key 0\.p\.0\.0 is there twice"),
    "same sample": ({"sample": 0}, r"key = 0\.p\.0\.1; wanted is 0\.p\.0\.0"),
    "sample text": ({"sample": "1"}, "sample = '1' must be a whole number"),
    "key of another group": ({"key": "0.q.0.1"}, r"key = 0\.q\.0\.1; wanted is 0\.p\.0\.1"),
    "prompt id a number": ({"prompt_id": 7}, "prompt_id = 7 must be a text"),
    "two prompts in a group": ({"prompt_id": "q"}, r"group 0\.p\.0 is of prompt p, and now of q"),
    "other tokens in a group": ({"prompt_token_ids": [5, 7]}, "prompt_id p had other prompt tokens before"),
    "a mask of another name": ({"response_mask": [1, 1, 0]}, "response_mask changes what is trained.* into loss_mask"),
    "advantages": ({"advantages": [1.0, 1.0, 1.0]}, "advantages changes what is trained"),
    "half a surrogate pair": ({"prompt_id": "\ud83d"}, r"'\\ud83d' is half a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case, tmp_path):
    fields, message = BAD[case]
    path = write(tmp_path / "r.jsonl", [row(0), row(1) | fields])
    fails(path, f"r.jsonl, line 2: {message}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_only_parquet_has(value, tmp_path):
    path = write(tmp_path / "r.parquet", [row(0), row(1, reward=value)])
    fails(path, f"r.parquet, row 2: reward = {value}; a scored rollout needs a finite number")
    path = write(tmp_path / "r.parquet", [row(0), row(1, behavior_logprobs=[-1.0, value, 0.0])])
    fails(path, rf"r.parquet, row 2: behavior_logprobs\[1\] = {value}; a log-prob is finite")


def test_one_prompt_id_has_one_prompt(tmp_path):
    """The log keeps prompts by id: the second would be trained as the first."""
    other = {"group": "1.p.0", "prompt_token_ids": [6, 5]}
    rows = [row(0), row(1), *(row(i, key=f"1.p.0.{i}", **other) for i in range(2))]
    fails(write(tmp_path / "r.jsonl", rows), "line 3: prompt_id p had other prompt tokens before")


def test_columns_that_change_nothing_are_ignored(tmp_path):
    harmless = {"data_source": "x", "response_mask": None, "weights": None, "ref_logprobs": [0.0]}
    assert len(read_rollouts(write(tmp_path / "r.jsonl", [row(0, **harmless), row(1)]), LIMITS).groups) == 1


def test_files_as_people_have_them(tmp_path):
    rows = [row(0), row(1)]
    plain = write(tmp_path / "r.jsonl", rows).read_bytes()
    files = {
        "mark.jsonl": b"\xef\xbb\xbf" + plain,
        "crlf.jsonl": plain.replace(b"\n", b"\r\n"),
        "blank.jsonl": b"\n" + plain.replace(b"\n", b"\n  \n"),
        "zipped.jsonl.gz": gzip.compress(plain),
        "array.json": json.dumps(rows, indent=1).encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        (group,) = read_rollouts(tmp_path / name, LIMITS).groups
        assert [r.key for r in group.rollouts] == ["0.p.0.0", "0.p.0.1"], name


def test_bad_files(tmp_path):
    fails(tmp_path / "none.jsonl", r"none\.jsonl does not exist")
    fails(tmp_path, "is a directory: name a file")
    fails(write(tmp_path / "r.txt", []), 'unknown kind ".txt"')
    fails(write(tmp_path / "empty.jsonl", []), "the file is empty")
    (tmp_path / "broken.jsonl").write_text(json.dumps(row()) + '\n{"key": \n')
    fails(tmp_path / "broken.jsonl", r"broken\.jsonl, line 2: not JSON")
    (tmp_path / "torn.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(row(1))[:-9])
    fails(tmp_path / "torn.jsonl", r"torn\.jsonl, line 2: not JSON")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(row()).encode() + b'\n{"key": "\xe9"}')
    fails(tmp_path / "latin.jsonl", r"latin\.jsonl, line 2: not UTF-8 \(byte 9 of the line\)")
    (tmp_path / "deep.jsonl").write_text("\n" + '{"x":' + "[" * 100_000)
    fails(tmp_path / "deep.jsonl", r"deep\.jsonl, line 2: lists and objects are nested too deep")
    (tmp_path / "twice.jsonl").write_text('{"reward": 1, "reward": 0}')
    fails(tmp_path / "twice.jsonl", r'twice\.jsonl, line 1: the key "reward" is there twice')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    fails(tmp_path / "list.jsonl", "line 1: must be an object .*, not int")
    fails(write(tmp_path / "short.jsonl", [row(0)]), r"group 0\.p\.0 has 1 rollouts, schedule\.group_size = 2")
    second = {k: v for k, v in row(1).items() if k != "reward"}
    fails(write(tmp_path / "field.jsonl", [row(0), second]), "line 2: field reward is missing")
    table = pa.Table.from_arrays([pa.array([1.0]), pa.array([0.0])], names=["reward", "reward"])
    pq.write_table(table, tmp_path / "names.parquet")
    fails(tmp_path / "names.parquet", "two columns have one name")
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
    fails(path, r"chat\.parquet, row 1: the tokenizer has no chat template", tokenizer)
    tokenizer.chat_template = "{{ raise_exception('only system messages') }}"
    fails(path, r"chat\.parquet, row 1: the model's chat template refuses .* user: only system", tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} w0"
    assert read_rollouts(path, LIMITS, tokenizer).groups[0].prompt.token_ids.tolist() == [12, 3]


AUTHORS_BAD = {
    "reward NaN": ({"precomputed_reward": math.nan}, "precomputed_reward = nan"),
    "recorded null": ({"response_rewards": [1.0, None]}, "response_rewards = None"),
    "recorded text": ({"response_rewards": "1.0"}, "response_rewards = '1.0' must be a list"),
    "recorded others": ({"response_rewards": [1.0, 1.0]}, "response_rewards are not those of an earlier row"),
    "no response": ({"response": ""}, "response is empty"),
    "no prompt": ({"prompt": ""}, '"prompt" must be a text or a list of messages'),
    "no role": ({"prompt": [{"content": "w1"}]}, 'message 1 of "prompt" must be an object whose "role" is a text'),
    "a message as text": ({"prompt": ["w1"]}, 'message 1 of "prompt" must be an object'),
    "a chat with its answer": (
        {"prompt": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
        '"prompt" ends with the assistant',
    ),
    "a mask": ({"loss_mask": [1, 0]}, "loss_mask changes what is trained"),
    "weights": ({"weight": 0.5}, "weight changes what is trained"),
    "tools": ({"tools": [{"name": "x"}]}, "tools changes what is trained"),
    "unknown status": ({"status": "fine"}, 'status = "fine" is not one of'),
}


@pytest.mark.parametrize("case", AUTHORS_BAD)
def test_bad_rows_of_the_authors(case, tmp_path):
    fields, message = AUTHORS_BAD[case]
    kind = "parquet" if case == "reward NaN" else "jsonl"  # JSON has no NaN
    path = write(tmp_path / f"a.{kind}", [authors(), authors(**fields)])
    fails(path, f"(line|row) 2: {message}", micro_tokenizer())


def test_a_row_of_the_authors_lacks_a_column(tmp_path):
    second = {name: value for name, value in authors().items() if name != "response_rewards"}
    path = write(tmp_path / "a.jsonl", [authors(), second])
    fails(path, "line 2: field response_rewards is missing", micro_tokenizer())


def test_a_response_of_the_authors_that_was_cut_gets_no_end(tmp_path):
    rows = [{"finish": "length"}, {"finish": "stop"}, {"status": "invalid", "precomputed_reward": None}]
    path = write(tmp_path / "a.jsonl", [authors(response="12", **fields) for fields in rows])
    (group,) = read_rollouts(path, LIMITS, micro_tokenizer()).groups
    assert [r.response_ids.tolist() for r in group.rollouts] == [[5, 6], [5, 6, 2], [5, 6, 2]]
    assert [r.finish for r in group.rollouts] == ["length", "stop", "stop"]
    assert [r.reward for r in group.rollouts] == [1.0, 1.0, None]


PROMPTS = {"plain": "12>", "rendered before": "<bos>12>", "chat": [{"role": "user", "content": "12>"}]}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_prompts_of_the_authors_have_one_bos_and_no_eos(prompt, tmp_path):
    tokenizer = micro_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = write(tmp_path / "a.jsonl", [authors(prompt=prompt, response="12")])
    (group,) = read_rollouts(path, Limits(32, 8, (2,), 2), tokenizer).groups
    assert group.prompt.token_ids.tolist() == [1, 5, 6, tokenizer.convert_tokens_to_ids(">")]
