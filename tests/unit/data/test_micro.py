"""Micro tasks and their tokenizer."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oapl_engine.config import DataConfig
from oapl_engine.data.micro import VOCABULARY, micro_source, micro_tokenizer
from oapl_engine.errors import ConfigError
from oapl_engine.rewards import verify

TOKENIZER = micro_tokenizer()
CHARACTERS = "".join(v for v in VOCABULARY if len(v) == 1)


@given(st.text(CHARACTERS))
def test_decode_undoes_encode(text):
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


def test_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.decode(again.encode("12 + 3\n>15")) == "12 + 3\n>15"
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id, len(again)) == (0, 1, 2, 32)


@given(st.integers(0, 10**9), st.integers(1, 9))
def test_sort_is_sorted(index, digits):
    problem = micro_source(DataConfig(task="sort", options={"digits": digits})).problem(index)
    assert re.fullmatch(rf"\d{{{digits}}}>", problem.question)
    assert problem.record["answer"] == "".join(sorted(problem.question[:-1]))


@given(st.integers(0, 10**9))
def test_addition_is_right_and_its_scratchpad_adds_up(index):
    problem = micro_source(DataConfig(task="addition", options={})).problem(index)
    a, b = map(int, re.fullmatch(r"(\d{3})\+(\d{3})=", problem.question).groups())
    pad, _, result = problem.record["solution"].partition(">")
    assert int(problem.record["answer"]) == int(result) == a + b
    columns = [int(c) for c in pad.split(",")]
    assert columns[-1] * 100 + columns[1] % 10 * 10 + columns[0] % 10 == a + b


@pytest.mark.parametrize("name", ["sort", "addition"])
def test_solution_scores_one_and_another_scores_zero(name):
    source = micro_source(DataConfig(task=name, options={}))
    first, second = source.problem(0), source.problem(1)
    for response, reward in ((first.record["solution"], 1.0), (second.record["solution"], 0.0)):
        assert verify(source.verifier, response, first.record, source.verifier_options).reward == reward


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("srot", {}, "did you mean sort"),
        ("sort", {"digit": 6}, r"options\.digit: unknown.*did you mean digits"),
        ("sort", {"digits": 0}, "from 1 to 32"),
        ("sort", {"digits": True}, "True: a whole number"),
        ("addition", {"digits": "3"}, "'3': a whole number"),
    ],
)
def test_bad_options_are_named(task, options, message):
    with pytest.raises(ConfigError, match=message):
        micro_source(DataConfig(task=task, options=options))
