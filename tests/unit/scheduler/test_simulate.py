"""Virtual time: a run by hand, failures, the idle bar, and no mode in what drives."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from oapl_engine.config import load_recipe
from oapl_engine.schedule_config import MODES
from oapl_engine.scheduler import driver, lockstep, simulate
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.state import Settings, State
from tests.support.fake_machine import make_settings

COSTS = {"Train": 3.0, "Publish": 1.0, "Sleep": 0.5, "Wake": 0.25, "LoadTrainer": 2.0, "OffloadTrainer": 4.0}
SMALL = simulate.Machine(engines=1, slots=16, token_seconds=0.1, costs=COSTS, tokens_mean=10.0)
PHASED = make_settings(steps=4, lag=2, max_groups_ahead=4, evaluate=False)
RECORDED = Path(__file__).parent / "recorded"


def fleet(devices, failure_seconds=float("inf")):
    """70 % of the devices generate, as fast as the others train; 16 samples per prompt, a tail of 4 times the mean."""
    engines = round(0.7 * devices)
    return simulate.Machine(
        engines=engines, slots=32, token_seconds=0.025, group_size=16, tokens_mean=1000, tokens_sigma=0.8,
        tokens_most=4096, verify_seconds=2.0, costs={"Publish": 2.0, "Checkpoint": 2.0},
        train_token_seconds=1.01 * 0.025 / 32 / engines, failure_seconds=failure_seconds, restart_seconds=60.0,
    ), make_settings(
        "async", steps=120, groups_per_step=devices, lag=30, window=2, max_groups_ahead=30 * devices,
        on_publish="keep", evaluate=False, engines=engines,
    )  # fmt: skip


def test_a_phased_run_takes_what_one_adds_up_by_hand():
    """32 sequences of a second in 16 slots: 2 s per phase; then sleep, load, two steps; offload, two wakes between."""
    outcome = simulate.simulate(SMALL, PHASED)
    phase = 2.0 + 0.5 + 2.0 + 2 * 3.0
    publish = 1.0 + 0.25
    assert outcome.seconds == pytest.approx(2 * phase + 2 * publish + (4.0 + 0.25))
    assert outcome.lags == {0: 4, 1: 4}
    assert outcome.cleared == 0


def test_overlap_hides_the_shorter_of_two():
    """Async on two devices of the same speed: no longer than training alone, and one window at its start."""
    machine = replace(SMALL, slots=64, costs={"Train": 1.0})
    settings = make_settings("async", steps=40, window=2, on_publish="keep", evaluate=False)
    outcome = simulate.simulate(machine, settings)
    assert 40 <= outcome.seconds < 42
    assert max(outcome.lags) < 8
    assert simulate.simulate(machine, replace(settings, overlaps=False, window=1)).seconds == pytest.approx(50)


def test_a_fleet_with_a_long_tail_idles_little():
    outcome = simulate.simulate(*fleet(64))
    assert 1 - outcome.training <= 0.03
    assert 1 - outcome.generation <= 0.05
    assert 30 < max(outcome.lags) < 60, "one window was carried"
    waits = simulate.simulate(fleet(64)[0], replace(fleet(64)[1], on_publish="drain"))
    assert waits.training < outcome.training - 0.05, "a publish that waits for stragglers costs"


def test_engines_die_and_the_run_goes_on():
    machine, settings = fleet(8, failure_seconds=1500.0)
    outcome = simulate.simulate(machine, settings)
    assert outcome.failures > 3
    assert sum(outcome.lags.values()) == 120 * 8
    assert outcome == simulate.simulate(machine, settings), "the same arguments, the same outcome"


@pytest.mark.parametrize("name", ["phased_two_ranks"])
def test_a_recorded_run_replays_to_the_same_commands(name):
    """events.jsonl of a real run, as it was written then: the core still says what it said."""
    recipe = load_recipe(RECORDED / f"{name}.toml")
    messages = [message for _, message in driver.read_record(RECORDED / f"{name}.jsonl")]
    commands = [m for m in messages if isinstance(m, e.Command)]
    assert len(commands) > 30
    assert driver.replay(State(Settings.from_recipe(recipe, engines=2)), messages) == commands
    other = Settings.from_recipe(replace(recipe, schedule=replace(recipe.schedule, lag=5)), engines=2)
    assert driver.replay(State(other), messages) != commands


def modes_in(source):
    """Where a program looks at the mode: its name as text, or the settings that stand for it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        named = isinstance(node, ast.Constant) and node.value in MODES
        asked = isinstance(node, ast.Attribute) and node.attr in (
            "overlaps",
            "generates",
            "drain",
            "oversampling",
            "traits",
        )
        of_settings = isinstance(node, ast.Attribute) and node.attr == "mode" and "command" not in ast.unparse(node)
        found += [ast.unparse(node)] if named or asked or of_settings else []
    return found


@pytest.mark.parametrize("module", [driver, simulate, lockstep])
def test_what_drives_knows_no_mode(module):
    source = Path(module.__file__).read_text()
    assert modes_in(source) == []
    for planted in ("if state.settings.mode == 'x': pass", "if state.settings.overlaps: pass", "x = 'async'"):
        assert modes_in(f"{source}\n{planted}\n")
