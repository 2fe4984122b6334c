"""Order, held-out problems, rendering."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oapl_engine.config import DataConfig
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.data.problem import Problem, Source
from oapl_engine.data.render import renderer
from oapl_engine.data.task import Task, load_task
from oapl_engine.errors import ConfigError

TOKENIZER = micro_tokenizer()


def prompts(t, position=0):
    return map(t.prompt, itertools.count(position))


def source(texts, finite=True):
    """Problems with the given texts; where generated, spare numbers draw from the same texts."""

    def problem(i):
        text = texts[i] if i < len(texts) else random.Random(i).choice(texts)
        return Problem(f"p{i}", text, {})

    return Source("letters", len(texts), problem, finite, "exact")


def task(texts, seed=0, held_out=0, limit=512, finite=True):
    data = DataConfig(source="micro", template="raw", held_out=held_out, max_prompt_tokens=limit)
    return Task(source(texts, finite), data, seed, renderer(data, TOKENIZER))


def text(prompt):
    return TOKENIZER.decode(prompt.token_ids)


questions = st.lists(st.text("0123456789", min_size=1, max_size=4), min_size=2, max_size=30)


@settings(max_examples=60, deadline=None)
@given(texts=questions, seed=st.integers(0, 2**31 - 1), position=st.integers(0, 90))
def test_order_resumes_from_an_integer(texts, seed, position):
    whole = list(itertools.islice(prompts(task(texts, seed)), 100))
    resumed = list(itertools.islice(prompts(task(texts, seed), position), 100 - position))
    assert [p.id for p in whole[position:]] == [p.id for p in resumed]


@settings(max_examples=60, deadline=None)
@given(texts=questions, held_out=st.integers(0, 10), finite=st.booleans(), seed=st.integers(0, 99))
def test_held_out_is_disjoint_by_text_despite_duplicates(texts, held_out, finite, seed):
    distinct = len(set(texts))
    if held_out >= distinct:
        with pytest.raises(ConfigError, match=r"held_out"):
            task(texts, seed, held_out, finite=finite).prompt(0)
        return
    t = task(texts, seed, held_out, finite=finite)
    held = [text(p) for p in t.held_out]
    trained = [text(p) for p in itertools.islice(prompts(t), 2 * t.size)]
    assert len(set(held)) == len(held) == held_out
    assert not set(held) & set(trained)
    if finite:
        assert set(held) | set(trained) == set(texts)


@settings(max_examples=40, deadline=None)
@given(texts=questions, finite=st.booleans())
def test_an_epoch_has_each_prompt_id_once(texts, finite):
    """And the next epoch has another order."""
    t = task(texts, 1, held_out=0 if len(set(texts)) == 1 else 1, finite=finite)
    first, second = ([t.prompt(e * t.size + i).id for i in range(t.size)] for e in (0, 1))
    assert len(set(first)) == t.size
    if finite:
        assert sorted(first) == sorted(second)
    assert {t.epoch(0), t.epoch(t.size - 1)} == {0}
    assert t.epoch(t.size) == 1


def test_epochs_and_seeds_are_shuffled_differently():
    texts = [str(i) for i in range(100)]
    t, other = task(texts, 0), task(texts, 1)
    orders = [[x.prompt(p).id for p in range(start, start + 100)] for x, start in ((t, 0), (t, 100), (other, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_held_out_problems_do_not_depend_on_the_seed_and_nest():
    texts = [str(i) for i in range(100)]
    ids = [[p.id for p in task(texts, seed, n).held_out] for seed, n in ((0, 20), (7, 20), (0, 10))]
    assert ids[0] == ids[1]
    assert ids[0][:10] == ids[2]


@pytest.mark.parametrize("finite", [True, False])
def test_long_prompts_are_dropped_counted_and_listed(finite):
    texts = [str(10**i) for i in range(8)]  # 1 to 8 tokens
    t = task(texts, held_out=2, limit=5, finite=finite)
    seen = [t.prompt(i) for i in range(3 * t.size)]
    assert max(len(p.token_ids) for p in seen) <= 5
    assert {p: n for p, n in t.dropped.items() if int(p[1:]) < 8} == {"p5": 6, "p6": 7, "p7": 8}


def test_nothing_left_after_dropping_is_an_error_with_a_way_out():
    with pytest.raises(ConfigError, match=r"max_prompt_tokens = 2 .*up to 4 tokens.*raise max_prompt_tokens"):
        task(["1111", "2222"], limit=2)
    with pytest.raises(ConfigError, match=r"max_prompt_tokens = 2"):
        task(["1111", "2222"], limit=2, finite=False).prompt(0)


def test_generated_problems_are_made_only_when_asked_for():
    made = []

    def problem(i):
        made.append(i)
        return Problem(f"p{i}", str(i), {})

    data = DataConfig(source="micro", template="raw", held_out=3)
    t = Task(Source("s", 10**6, problem, False, "exact"), data, 0, renderer(data, TOKENIZER))
    t.prompt(12_345)
    assert len(made) == 4


def test_templates():
    chat = micro_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'][0] == 's' and '#' or '?' }}{{ m['content'] }}{% endfor %}"
        "{{ add_generation_prompt and '=' or '' }}"
    )
    cases = {"raw": "12", "chat": "#(7)?12=", "(1)=1;{question}=": "(1)=1;12="}
    for template, expected in cases.items():
        data = DataConfig(template=template, system="(7)" if template == "chat" else "")
        ids = renderer(data, chat)(Problem("p", "12", {}))
        assert ids.dtype == np.int32
        assert chat.decode(ids) == expected


def test_bad_templates_are_named():
    bare = micro_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template.*raw"):
        renderer(DataConfig(template="chat"), bare)
    with pytest.raises(ConfigError, match=r"no \{question\}"):
        renderer(DataConfig(template="solve"), bare)
    with pytest.raises(ConfigError, match=r"data\.system"):
        renderer(DataConfig(template="raw", system="be brief"), bare)


def test_finished_rollouts_are_no_prompts():
    with pytest.raises(ConfigError, match=r"parquet.*offline"):
        load_task(DataConfig(source="parquet", path="x"), 0, TOKENIZER)
