"""The math verifier: a table of answers, responses that make no sense, records that cannot be read."""

import random
import threading
import tomllib
from contextlib import closing

import pytest

from oapl_engine.errors import ConfigError
from oapl_engine.rewards import VerifierPool, check_record, verify
from tests.conftest import ROOT

TABLE = tomllib.loads((ROOT / "tests/unit/rewards/math_answers.toml").read_text())
KNOWN_REJECTS = TABLE.pop("known_rejects")["boxed"]
CASES = [
    (kind, answer, response if key.startswith("said") else f"So it is $\\boxed{{{response}}}$.", key.endswith("right"))
    for kind, keys in TABLE.items()
    for key, rows in keys.items()
    for answer, response in rows
]


def test_the_table_is_large():
    assert len(CASES) > 600
    assert sum(right for *_, right in CASES) > 300


@pytest.mark.parametrize("kind", TABLE)
def test_answers_of_the_table(kind):
    faults = []
    for _, answer, response, right in (case for case in CASES if case[0] == kind):
        verdict = verify("math", response, {"answer": answer})
        if (verdict.status, verdict.reward) != ("scored", float(right)):
            faults.append((answer, response, verdict))
    assert not faults


def test_known_rejects():
    """Right answers that are scored 0: one that is accepted leaves this list."""
    boxed = [(answer, f"\\boxed{{{response}}}") for answer, response in KNOWN_REJECTS]
    assert [verify("math", response, {"answer": answer}).reward for answer, response in boxed] == [0] * len(boxed)


COMMANDS = (
    r"\frac \sqrt \int \sum \left \right ( ) { } [ ] ^ _ + - * / = < > , x y 1 2 9 ! \pi \sin \log \lim | % $ . :"
)
COMMANDS += r" \begin{pmatrix} \end{pmatrix} \\ & \text{ \cdot \infty \to \binom \choose \overline \circ \pm \cup \mod"
NONSENSE = [
    *("", " ", "\x00", "\ud800", "٣", "²", "a" * 100_000, "1 " * 50_000, "$" * 100_000, r"\(" * 50_000, "$$ " * 33_000),
    *(r"\boxed{" * 16_000, r"\boxed{1" * 16_000, "answer is " * 10_000, "#" * 100_000, "{" * 100_000, "(" * 100_000),
    *("9" * 10**6, "-" * 100_000, "x^" * 50_000, "\\" * 100_000, "\n" * 100_000, "1," * 50_000, "**" * 50_000),
]
HEAVY = [
    *(
        "9" * 10**6,
        "x^" * 200 + "1",
        "x_" * 200,
        "|x|" * 100,
        "1+" * 240 + "1",
        "(x+1)" * 90,
        "(x+1)^{1000000}",
        "1,2" * 160,
    ),
    *(
        r"\sqrt{" * 6 + "2" + "}" * 6,
        "2" + "^{99" * 6 + "}" * 6,
        "1" + "!" * 300,
        "-" * 400 + "1",
        "a" * 499,
        "1<" * 200 + "x",
    ),
    *(
        r"e^{e^{e^{e^{9}}}}",
        r"\sin(10^{100000})",
        r"(\frac13)^{-100000}",
        "(9^{9999})^{9999}",
        "(20000!)^{20}",
        "1e400",
    ),
    *(r"\binom{1000000000}{500000000}", r"\gcd(10^{100},3)", r"10^{10^5} \mod 7", "0^{-1}", "0/0", r"\infty-\infty"),
    *(r"\log 0", r"\tan\frac{\pi}{2}", "i^{i^{i^i}}", r"0.\overline{" + "3" * 400 + "}", "100000!/99999!", "x^5-x-1>0"),
]
ANSWERS = ["42", "x^2-1", "(1,2)", "x>3", r"\{1,2\}", r"\text{Monday}", "y=2x+3", r"5\text{ cm}", "B", "100001!"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_nonsense_is_wrong_and_nothing_else(answer):
    rng = random.Random(answer)
    tokens = COMMANDS.split()
    soups = ["".join(rng.choices(tokens, k=k)) for k in (5, 10, 20, 40, 200) for _ in range(10)]
    noise = [rng.randbytes(2000).decode("latin1") for _ in range(3)]
    boxed = [f"\\boxed{{{text}}}" for text in [*HEAVY, *soups, *noise]]
    for response in [*NONSENSE, *noise, *boxed]:
        verdict = verify("math", response, {"answer": answer})
        assert (verdict.status, verdict.reward) == ("scored", 0), (response[:80], verdict)


def test_a_response_that_cannot_be_read_says_why():
    for response in (r"\boxed{\frac{1}{2}\sqrt}", r"\boxed{" + "1+" * 400 + "1}", r"\boxed{((((((((1))))))))}", "?"):
        assert verify("math", response, {"answer": "1"}).detail["reason"]


@pytest.mark.parametrize("answer", ["", "?", "...", r"\frac{1}{", "{", r"\frac{1}{0}", "9" * 5000, r"\sqrt", 3, None])
def test_an_answer_that_cannot_be_read_is_refused(answer):
    """At load by check_record; scoring with it is an error."""
    with pytest.raises(ConfigError, match='"answer" = '):
        check_record("math", {"answer": answer}, {})
    assert verify("math", "1", {"answer": answer}).status == "error"


def test_answers_of_the_table_are_records():
    for _, answer, *_ in CASES:
        check_record("math", {"answer": answer}, {})


def test_verifiers_without_a_check_take_any_record():
    check_record("exact", {}, {})
    check_record("reasoning_gym", {}, {})


def test_threads_and_the_pool_score_the_same():
    """math-verify's time limit, an alarm, would fail in a thread and make every answer wrong."""
    cases = [(response, {"answer": answer}) for _, answer, response, _ in CASES[::20]]
    expected = [float(right) for *_, right in CASES[::20]]
    rewards = []
    thread = threading.Thread(target=lambda: rewards.extend(verify("math", *case).reward for case in cases))
    thread.start()
    thread.join()
    with closing(VerifierPool(1, timeout_seconds=60)) as pool:
        assert [verdict.reward for verdict in pool.verify_many("math", cases)] == rewards == expected
