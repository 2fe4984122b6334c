"""Scorer: responses without a reward are told, counted, and end a run where they are many."""

import asyncio
import sys
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from oapl_engine.config import RewardConfig
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.data.problem import Problem
from oapl_engine.errors import ConfigError, RunError
from oapl_engine.rewards import Verdict
from oapl_engine.rollout.scorer import FEWEST, RECENT, InvalidShare, Scorer, check_records, check_reward, reward_of
from oapl_engine.samples import Prompt

PROMPT = Prompt("p1", np.array([4], np.int32), "t", {"answer": "01"})
RIGHT, FAILED = (
    Verdict("scored", 1.0),
    Verdict("error", None, {"reason": "KeyError: 'x'", "traceback": "File a.py: KeyError"}),
)


def test_the_first_response_without_a_reward_is_told_once():
    said = []
    watch = InvalidShare(0.5, said.append)
    for verdict in (RIGHT, FAILED, RIGHT, FAILED):
        watch.count(PROMPT, verdict)
    assert said == ["first response without a reward, to problem p1: File a.py: KeyError"]


def test_a_share_above_the_limit_ends_the_run_with_the_last_reason():
    watch = InvalidShare(0.1)
    for number in range(FEWEST - 1):
        watch.count(PROMPT, FAILED if number < 3 else RIGHT)
    with pytest.raises(RunError, match=r"12% of the responses got no reward .*max_invalid_share = 0\.1.*File a\.py"):
        watch.count(PROMPT, FAILED)


def test_old_verdicts_are_forgotten():
    """A verifier that breaks after a long good time is noticed soon, one that recovered is forgiven."""
    watch = InvalidShare(0.1)
    for _ in range(10 * RECENT):
        watch.count(PROMPT, RIGHT)
    counted = 0
    with suppress(RunError):
        while counted < RECENT:
            watch.count(PROMPT, FAILED)
            counted += 1
    assert counted == RECENT // 10


def test_the_verifier_reads_the_response_without_its_end():
    """'#' ends a response here and is not a special token: the exact answer would not match with it."""
    tokenizer = micro_tokenizer()
    scorer = Scorer(RewardConfig(), "exact", {}, tokenizer, (2, 31))
    try:
        response = [*tokenizer.encode("01"), 31]
        assert asyncio.run(scorer.verify(PROMPT, response)).reward == 1.0
        assert [v.reward for v in scorer.verify_many([(PROMPT, response), (PROMPT, [5, 2])])] == [1.0, 0.0]
    finally:
        scorer.close()


def test_options_of_the_source_are_for_its_own_verifier():
    """A reward of the user's own is not given the marker that the source's verifier looks for."""
    source = {"extract": "after", "marker": ">"}
    assert reward_of(RewardConfig(), "exact", source) == ("exact", source)
    assert reward_of(replace(RewardConfig(), name="math"), "exact", source) == ("math", {})


def test_answers_that_cannot_be_read_are_named_by_their_line():
    problems = [
        Problem(f"p{n}", "?", {"answer": answer}, place=f"f.jsonl, line {n}") for n, answer in enumerate("12{4")
    ]
    with pytest.raises(ConfigError, match=r'f\.jsonl, line 2: "answer" = .\{. is not a mathematical expression'):
        check_records("math", {}, problems)
    assert check_records("exact", {}, problems) == 4
    assert check_records("math", {}, problems, seconds=-1.0) == 0


OWN = """
def typo(response, record, options):
    return float(response == record["ansver"])

def on_its_answer_only(response, record, options):
    return {"01": 1.0}[response]

def good(response, record, options):
    return record["question"] == "1>", {1: response}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_rewards_of_scorer.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda function: (
        RewardConfig(),
        f"own_rewards_of_scorer:{function}",
        {},
        "p1",
        {"question": "1>", "answer": "01"},
    )
    sys.modules.pop("own_rewards_of_scorer", None)


def test_a_reward_that_fails_is_found_before_an_engine_starts(own):
    check_reward(*own("good"))
    with pytest.raises(ConfigError, match=r"(?s)whose record has question, answer: .*record\[\"ansver\"\].*KeyError"):
        check_reward(*own("typo"))
    with pytest.raises(ConfigError, match=r"the response 'I do not know\.' to problem p1"):
        check_reward(*own("on_its_answer_only"))
