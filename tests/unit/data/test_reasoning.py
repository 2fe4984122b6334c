"""reasoning-gym by name."""

import json
import os
import re
import subprocess
import sys

import pytest

from oapl_engine.config import DataConfig
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.data.reasoning import reasoning_source
from oapl_engine.data.task import load_task
from oapl_engine.errors import ConfigError
from oapl_engine.rewards import verify

TWO_TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "question": "expression"}


def test_a_task_by_name_with_options():
    data = DataConfig(source="reasoning_gym", task="chain_sum", options=TWO_TERMS, template="{question} =", held_out=20)
    task = load_task(data, 0, micro_tokenizer())
    prompt = task.prompt(0)
    left, sign, right, equals = micro_tokenizer().decode(prompt.token_ids).split()
    total = int(left) + int(right) * (1 if sign == "+" else -1)
    assert equals == "="
    assert verify("reasoning_gym", str(total), prompt.record).reward == 1
    assert json.loads(json.dumps(prompt.record)) == prompt.record
    assert (prompt.task, task.source.verifier, len(task.held_out)) == ("chain_sum", "reasoning_gym", 20)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("chain_sums", {}, "did you mean chain_sum"),
        ("chain_sum", {"min_term": 2}, "options.min_term: unknown for chain_sum; did you mean min_terms"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "chain_sum refuses them"),
        ("chain_sum", {"min_terms": "two"}, "chain_sum refuses them"),
        ("chain_sum", {"question": "expresion"}, "did you mean expression"),
        ("chain_sum", {"size": 0}, "size"),
        ("gcd", {"size": "many"}, "size"),
    ],
)
def test_bad_names_and_options_are_named(task, options, message):
    with pytest.raises(ConfigError, match=message):
        reasoning_source(DataConfig(task=task, options=options))


def question(task, **options):
    return reasoning_source(DataConfig(task=task, options=options)).problem(3).question


def test_the_question_is_the_data_sets_own_or_a_field():
    assert "\nWho " in question("needle_haystack")  # its metadata has a field "question" too, without the haystack
    assert re.fullmatch(r"\w+, \w+, \w+", question("word_sorting", min_words=3, max_words=3, question="original_words"))


@pytest.mark.parametrize("task", ["gsm_symbolic", "time_intervals", "calendar_arithmetic", "rearc", "simple_equations"])
def test_records_are_json_and_score_their_own_answers(task):
    source = reasoning_source(DataConfig(task=task, options={"size": 50}))
    for record in (source.problem(i).record for i in range(20)):
        assert json.loads(json.dumps(record)) == record
        assert verify("reasoning_gym", record["entry"]["answer"], record).reward == 1


PROBLEMS = """
import sys
from oapl_engine.config import DataConfig
from oapl_engine.data.reasoning import reasoning_source
numbers = [int(n) for n in sys.argv[1].split(",")]
for task in ("isomorphic_strings", "ransom_note", "polynomial_multiplication", "list_functions"):
    source = reasoning_source(DataConfig(task=task, options={"size": 40}))
    print(task, sorted((n, source.problem(n).question) for n in numbers))
"""


def test_problems_are_the_same_in_every_process():
    """In any order, though these data sets choose from sets of texts, or draw from the global generator."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROBLEMS, ",".join(map(str, order))],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, order in (("1", range(20)), ("2", reversed(range(20))))
    }
    assert len(outputs) == 1


def test_without_pycosat_only_zebra_puzzles_are_refused():
    code = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "pycosat":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from oapl_engine.config import DataConfig
from oapl_engine.data.reasoning import reasoning_source
from oapl_engine.errors import ConfigError
from oapl_engine.rewards import verify
source = reasoning_source(DataConfig(task="gcd", options={}))
print(verify("reasoning_gym", source.problem(0).record["entry"]["answer"], source.problem(0).record).reward)
try:
    reasoning_source(DataConfig(task="zebra_puzzles", options={}))
except ConfigError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == "1.0"
    assert "zebra_puzzles" in out[1]
    assert "pip install pycosat" in out[1]
