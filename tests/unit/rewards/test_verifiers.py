"""Verifiers: what is right, what is wrong, and what is neither."""

import json
import sys
import types
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oapl_engine.errors import ConfigError
from oapl_engine.rewards import verify
from oapl_engine.rewards.exact import extract_answer
from oapl_engine.rewards.verdict import check_verifier

NUMBER = {"extract": "last_number"}


@pytest.mark.parametrize(
    ("response", "options", "answer"),
    [
        (" 7 \n", {}, "7"),
        ("7\n3 + 4 = 7", {"extract": "first_line"}, "7"),
        ("\n7", {"extract": "first_line"}, ""),
        ("3 + 4 is 7, so 12.", NUMBER, "12"),
        ("it costs $1,234.50!", NUMBER, "1234.50"),
        ("-5", NUMBER, "-5"),
        ("9−5", NUMBER, "5"),
        ("the sum is −5", NUMBER, "-5"),
        ("about 3/4", NUMBER, "3/4"),
        ("1, 2, 3,", NUMBER, "3"),
        ("none", NUMBER, None),
        ("x #### 3 #### 4 ", {"extract": "after", "marker": "####"}, "4"),
        ("4", {"extract": "after", "marker": "####"}, None),
    ],
)
def test_extraction(response, options, answer):
    assert extract_answer(response, options) == answer


@given(st.integers(), st.text("abc .,\n", max_size=8))
def test_last_number_finds_any_integer_in_prose(number, words):
    assert extract_answer(f"it is {number}{'' if words[:1] in '.,' else ' '}{words}", NUMBER) == str(number)


def test_exact():
    record = {"answer": "012"}
    assert verify("exact", "012 ", record).reward == 1
    assert verify("exact", "12", record) == verify("exact", " 12", record)
    assert verify("exact", "12", record).reward == 0
    assert verify("exact", "12", record).status == "scored"


@pytest.mark.parametrize(
    ("gold", "response", "reward"),
    [
        ("1/2", r"so the answer is \boxed{\frac{1}{2}}.", 1),
        (r"\frac12", "0.5", 1),
        ("1,234", "It is 1234.", 1),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1),
        ("-4", r"\boxed{4}", 0),
        ("12", "I do not know", 0),
        ("12", "", 0),
        ("2", r"\boxed{\frac{1}{", 0),
        (r"\sqrt{8}", r"$2\sqrt{2}$", 1),
    ],
)
def test_math(gold, response, reward):
    verdict = verify("math", response, {"answer": gold})
    assert (verdict.status, verdict.reward) == ("scored", reward)


def test_an_unusable_record_is_an_error_not_a_wrong_answer():
    for name, record in (("math", {"answer": ""}), ("exact", {}), ("exact", {"answer": 3}), ("reasoning_gym", {})):
        verdict = verify(name, "1", record)
        assert (verdict.status, verdict.reward) == ("error", None)
        assert verdict.detail["reason"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exakt", {}, "did you mean exact"),
        ("code", {}, "is not a verifier; there are: exact, math"),
        ("exact", {"extrakt": "all"}, "extrakt: unknown"),
        ("exact", {"extract": "last"}, "'last': one of all"),
        ("exact", {"extract": "after"}, "marker = ''"),
        ("reasoning_gym", {"marker": "#"}, "marker = '#'"),
        ("math", {"extract": "all"}, "has none"),
        ("no_such_module:score", {}, "cannot be loaded"),
    ],
)
def test_unknown_names_and_options_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        verify(name, "1", {"answer": "1"}, options)


def verdict_of(monkeypatch, function):
    name = f"own_{id(function)}"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(score=function))
    return verify(f"{name}:score", "r", {})


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), None, "1", [1], 1j])
def test_a_reward_that_is_not_a_finite_number_is_invalid(monkeypatch, reward):
    verdict = verdict_of(monkeypatch, lambda *_: reward)
    assert (verdict.status, verdict.reward) == ("invalid", None)
    assert "reward" in verdict.detail["reason"]


def test_own_verifiers(monkeypatch):
    assert verdict_of(monkeypatch, lambda *_: (0.25, {"why": "half of half"})).detail == {"why": "half of half"}
    assert verdict_of(monkeypatch, lambda *_: True).reward == 1.0

    def broken(*_):
        raise ZeroDivisionError("oops")

    assert verdict_of(monkeypatch, broken).detail["reason"] == "ZeroDivisionError: oops"
    assert 'raise ZeroDivisionError("oops")' in verdict_of(monkeypatch, broken).detail["traceback"]
    assert verdict_of(monkeypatch, broken).status == "error"


@pytest.mark.parametrize(
    ("returned", "reward"),
    [
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (np.float32(0.25), 0.25),
        (np.int64(2), 2.0),
        (torch.tensor(0.75), 0.75),
        (Decimal("0.5"), 0.5),
        (Fraction(1, 4), 0.25),
        ((1, "why"), 1.0),
        ((1, None), 1.0),
        ((1, {1: 2, (1, 2): np.arange(2)}), 1.0),
    ],
)
def test_what_peoples_code_returns_is_taken(monkeypatch, returned, reward):
    verdict = verdict_of(monkeypatch, lambda *_: returned)
    assert (verdict.status, verdict.reward) == ("scored", reward)
    assert type(verdict.reward) is float
    assert all(type(key) is str for key in verdict.detail)


@pytest.mark.parametrize(
    "returned",
    [None, "1.0", [1.0], np.array([1.0]), 1 + 0j, float("nan"), np.float64("nan"), float("-inf"), 10**400, (1.0,)],
)
def test_what_is_no_finite_number_is_invalid(monkeypatch, returned):
    assert verdict_of(monkeypatch, lambda *_: returned).status == "invalid"
    verdict = verdict_of(monkeypatch, lambda *_: (returned, "why"))
    assert (verdict.status, verdict.detail["detail"]) == ("invalid", "why")


def test_details_of_any_shape_are_kept_as_json(monkeypatch):
    """Keys that JSON does not have, below the first level too, and a detail that holds itself."""
    detail = {"by": [{(1, 2): {3: "x"}}], 4: 5}
    detail["itself"] = detail
    verdict = verdict_of(monkeypatch, lambda *_: (1.0, detail))
    assert verdict.reward == 1.0
    kept = json.loads(json.dumps(verdict.detail))
    assert (kept["by"], kept["4"], kept["itself"]["4"]) == ([{"(1, 2)": {"3": "x"}}], 5, 5)


OWN = """
from oapl_engine.errors import ConfigError

def score(response, record, options):
    return float(response == options["want"])

def check_options(options):
    if "want" not in options:
        raise ConfigError("reward.options.want is missing")
"""


def test_an_own_module_is_checked_before_anything_starts(monkeypatch, tmp_path):
    (tmp_path / "own_verifier.py").write_text(OWN)
    (tmp_path / "own_unchecked.py").write_text("def score(*_): return 1")
    monkeypatch.syspath_prepend(tmp_path)
    check_verifier("own_verifier:score", {"want": "r"})
    check_verifier("own_unchecked:score", {"anything": 1})
    assert verify("own_verifier:score", "r", {}, {"want": "r"}).reward == 1
    with pytest.raises(ConfigError, match=r"reward\.options\.want is missing"):
        check_verifier("own_verifier:score", {})
    with pytest.raises(ConfigError, match=r'reward\.name = "own_verifier:scor" cannot be loaded: .*no attribute'):
        check_verifier("own_verifier:scor", {})
    (tmp_path / "own_failing.py").write_text("score = 5\ndef check(*_): return 1\ndef check_options(o): 1 / 0\n")
    with pytest.raises(ConfigError, match=r'"own_failing:score" is 5, not a function'):
        check_verifier("own_failing:score", {})
    with pytest.raises(ConfigError, match="check_options fails:"):
        check_verifier("own_failing:check", {})
    with pytest.raises(ConfigError, match=r'reward\.name = "own_verifyer:score" cannot be loaded: No module named'):
        check_verifier("own_verifyer:score", {})
