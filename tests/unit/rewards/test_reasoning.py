"""reasoning-gym's scorers on records: own answers, nonsense, and responses that are programs."""

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
import reasoning_gym

from oapl_engine.config import DataConfig
from oapl_engine.data.reasoning import reasoning_source
from oapl_engine.reasoning_gym_import import (
    EVAL,
    PARSE_EXPR,
    create_data_set,
    decode_entry,
    encode_entry,
    parse_arithmetic,
    reasoning_gym_registry,
)
from oapl_engine.rewards import verify

NUMBER = {"extract": "last_number"}
NONSENSE = [
    *("I do not know", "", "]]]", "0", "None", "null", "[None]", "{}", "-1", "1/0", "nan", "inf", "1e400", "True", "A"),
    *("lambda x: x", "[[1, 2], [3, 4]]", "(1,", "9**9**9", "1000000000", "[" * 3000, "9" * 5000, "\ud800 é \x00"),
    *("the answer is 42. " * 2000, '[1, "a", None]', '{"a": 1}', "__import__('os').abort()", "2024-01-01"),
]
QUICK = [
    *(
        "acre",
        "arc_agi",
        "boxnet",
        "coin_flip",
        "complex_arithmetic",
        "countdown",
        "game_of_life",
        "gcd",
        "graph_color",
    ),
    *(
        "game_of_life_halting",
        "knights_knaves",
        "n_queens",
        "number_sorting",
        "polynomial_equations",
        "rearc",
        "sudoku",
    ),
    *("prime_factorization", "propositional_logic", "puzzle24", "rubiks_cube", "rush_hour", "simple_integration"),
    *("spiral_matrix", "string_insertion", "binary_matrix", "polynomial_multiplication", "time_intervals", "chain_sum"),
]


def problems(name, size):
    """(record as it comes out of JSON, entry as the data set makes it, data set)."""
    options = {"seed": 3, "size": size}
    source, data_set = reasoning_source(DataConfig(task=name, options=options)), create_data_set(name, options)
    for number in range(size):
        record = json.loads(json.dumps(source.problem(number).record))
        entry = data_set[number]
        yield record, entry if entry["answer"] == record["entry"]["answer"] else decode_entry(record["entry"]), data_set


def check(name, size):
    for record, entry, data_set in problems(name, size):
        own = entry["answer"]
        if own is not None:
            verdict = verify("reasoning_gym", own, record)
            assert verdict.status == "scored"
            assert verdict.reward == pytest.approx(data_set.score_answer(own, entry), abs=1e-9)
            assert verdict.reward == 1
        for response in NONSENSE:
            verdict = verify("reasoning_gym", response, record)
            assert verdict.status == "scored", (response[:40], verdict)
            assert verdict.reward < 1 or response in (own, "0"), (response[:40], verdict)
        assert verify("reasoning_gym", "I do not know", record).reward <= 0.25
        if own not in ("0", "0.0"):
            assert verify("reasoning_gym", "0", record).reward < 1


@pytest.mark.parametrize("name", QUICK)
def test_own_answers_are_right_and_nonsense_is_scored(name):
    check(name, 2)


@pytest.mark.live
@pytest.mark.parametrize("name", sorted(set(reasoning_gym_registry()) - {"composite"}))
def test_every_data_set_scores_its_own_answers(name):
    check(name, 6)


def test_with_extraction():
    record = reasoning_source(DataConfig(task="gcd", options={"size": 4})).problem(1).record
    answer = record["entry"]["answer"]
    said = f"The greatest common divisor is {answer}."
    assert verify("reasoning_gym", said, record, NUMBER).reward == 1
    assert verify("reasoning_gym", "nothing", record, NUMBER).reward == 0
    assert verify("reasoning_gym", f" {answer}\n8 and 4: 4", record, {"extract": "first_line"}).reward == 1


def test_a_scorer_uses_the_options_of_its_data_set():
    """Its tolerance is a unit of the last decimal place, the third without options."""
    options = {"size": 2, "min_num_decimal_places": 9, "max_num_decimal_places": 9, "precision": 15}
    record = reasoning_source(DataConfig(task="decimal_arithmetic", options=options)).problem(0).record
    answer = Decimal(record["entry"]["answer"])
    assert verify("reasoning_gym", str(answer), record).reward == 1
    assert verify("reasoning_gym", str(answer + Decimal("0.0000001")), record).reward < 0.1


def test_entries_survive_json():
    entry = {"a": [(1, 2), {3: "x", 4.5: None}, {"y"}], "b": {"c": ((True,),)}}
    assert decode_entry(json.loads(json.dumps(encode_entry(entry)))) == entry


def test_a_broken_record_is_an_error():
    """The scorer fails on its own answer too."""
    record = reasoning_source(DataConfig(task="number_format", options={"size": 2})).problem(0).record
    broken = record | {"entry": record["entry"] | {"metadata": {}}}
    assert verify("reasoning_gym", "1", record).status == "scored"
    assert verify("reasoning_gym", "1", broken).status == "error"


@pytest.mark.parametrize("name", [*EVAL, *PARSE_EXPR])
def test_responses_are_not_executed(name, tmp_path):
    """Scorers of these data sets call eval on a response, or sympy's parse_expr, which does."""
    record = reasoning_source(DataConfig(task=name.partition(".")[2], options={"size": 2})).problem(0).record
    touched = tmp_path / "touched"
    program = f"__import__('pathlib').Path({str(touched)!r}).touch()"
    for response in (program, f"[{program}]", f"1 + {program}"):
        assert verify("reasoning_gym", response, record).reward <= 0.05
    assert not touched.exists()


def test_no_other_scorer_evaluates_text():
    """A new version of reasoning-gym may have one more."""
    root = Path(reasoning_gym.__file__).parent
    calls = re.compile(r"(?<!literal_)\b(eval|exec|parse_expr|sympify)\(")
    found = {
        ".".join(file.relative_to(root).with_suffix("").parts)
        for file in root.rglob("*.py")
        if calls.search(file.read_text(encoding="utf-8").partition("def score_answer")[2])
    }
    # these two evaluate their own problem
    assert found - {"algorithmic.number_sorting", "arithmetic.bitwise_arithmetic"} == {*EVAL, *PARSE_EXPR}


@pytest.mark.parametrize(
    "text", ["2**3**4", "9**9999", "f(x)", "x.y", "'a'", "[1]", "exp(10**9)", "(" * 300, "1" * 3000]
)
def test_arithmetic_alone_is_parsed(text):
    with pytest.raises(ValueError, match=r"\w"):
        parse_arithmetic(text)
    assert parse_arithmetic("x**2 + sqrt(3)*exp(x)/2 - C") is not None
