"""data.source = "package.module:factory": problems from a module of the user's own."""

import itertools

import pytest

from oapl_engine.config import DataConfig
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.data.sources import check_source
from oapl_engine.data.task import load_task
from oapl_engine.errors import ConfigError
from oapl_engine.rewards import verify

OWN = """
from oapl_engine.data.problem import Problem, Source

def doubles(data):
    def problem(i):
        return Problem(f"double-{i}", f"2*{i}=", {"answer": str(2 * i)})
    return Source("doubles", data.options["size"], problem, finite=False, verifier="exact")

def nothing(data):
    return None

def needs_more(data, seed):
    return None

def leaves(data):
    raise SystemExit(0)

def breaks(data):
    return Source("breaks", 12, lambda i: 1 / 0, finite=False, verifier="exact")

def returns_text(data):
    return Source("returns_text", 12, str, finite=False, verifier="exact")
"""


@pytest.fixture(autouse=True)
def _own_module(monkeypatch, tmp_path):
    (tmp_path / "own_source.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def section(source):
    return DataConfig(source=source, options={"size": 12}, template="raw", held_out=4)


def test_an_own_source_gives_prompts_and_their_verifier():
    data, tokenizer = section("own_source:doubles"), micro_tokenizer()
    check_source(data, generates=True)
    task = load_task(data, 0, tokenizer)
    assert [tokenizer.decode(p.token_ids) for p in task.held_out] == ["2*0=", "2*1=", "2*2=", "2*3="]
    epoch = list(itertools.islice(map(task.prompt, itertools.count()), task.size))
    assert sorted(int(p.id.removeprefix("double-")) for p in epoch) == list(range(4, 12))
    for prompt in epoch:
        assert verify(task.source.verifier, prompt.record["answer"], prompt.record).reward == 1


def test_a_wrong_own_source_is_named():
    with pytest.raises(ConfigError, match=r'data\.source = "own_source:double" cannot be loaded: .*no attribute'):
        check_source(section("own_source:double"), generates=True)
    with pytest.raises(ConfigError, match=r'data\.source = "own_sauce:doubles" cannot be loaded: No module named'):
        check_source(section("own_sauce:doubles"), generates=True)
    with pytest.raises(ConfigError, match=r'data\.source = "own_source:nothing" returned NoneType: a factory returns'):
        load_task(section("own_source:nothing"), 0, micro_tokenizer())
    with pytest.raises(ConfigError, match=r'mode = "offline" reads rollouts from'):
        check_source(section("own_source:doubles"), generates=False)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("needs_more", r'"own_source:needs_more" fails:(.|\n)*missing 1 required positional'),
        ("leaves", r'"own_source:leaves" fails:(.|\n)*SystemExit: 0'),
        ("breaks", r"problem\(0\) fails:(.|\n)*ZeroDivisionError"),
        ("returns_text", r"problem\(0\) is '0', not a data.problem.Problem"),
    ],
)
def test_a_failing_own_source_is_named(factory, message):
    with pytest.raises(ConfigError, match=message):
        load_task(section(f"own_source:{factory}"), 0, micro_tokenizer())
