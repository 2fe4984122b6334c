"""The lag map: an even grid, an equal tuning budget on other problems, cells that resume, tables of what there is."""

import json
import math

import pytest

from experiments.cells import Cell, as_overrides, read_rows, run_cells
from experiments.lag_map import (
    DATA,
    HELD_OUT,
    LAGS,
    RECIPE,
    SETTINGS,
    best_setting,
    map_cells,
    tuning_cells,
    variant_cells,
)
from experiments.lag_map_report import PAGE, crossover, draw, map_table, overtakes, report, with_tables
from experiments.value_bias import SIZES, bias
from oapl_engine.config import load_recipe


def tuned(scores):
    """Rows of a finished tuning: `scores(objective, lag, setting)` right answers of 4 on the second half."""
    rows = {}
    for cell in tuning_cells():
        t = cell.tags
        right = [scores(t["objective"], t["lag"], t["setting"])] * HELD_OUT
        last = {"step": 400, "n": 4, "correct": [4] * HELD_OUT + right, "pass_at_k": {"1": 0.5}}
        rows[cell.name] = {"name": cell.name, **t, "evaluations": [last]}
    return rows


def test_the_grid_is_even_and_every_cell_is_a_valid_recipe():
    assert len({len(choices) for choices in SETTINGS.values()}) == 1
    rows = tuned(lambda objective, lag, setting: setting)
    cells = [*tuning_cells(), *map_cells(rows, 5), *variant_cells(rows, 3)]
    assert len({cell.name for cell in cells}) == len(cells)
    assert len(map_cells(rows, 5)) == 5 * len(LAGS) * 5
    for cell in cells:
        recipe = load_recipe(RECIPE, as_overrides(cell.settings))
        assert recipe.schedule.steps >= 2 * recipe.schedule.lag  # two publishes after the first
        tuning = cell.tags["kind"] == "tune"
        assert recipe.data.held_out == (2 * HELD_OUT if tuning else HELD_OUT)


def test_tuning_is_judged_on_problems_that_the_map_does_not_use():
    best = {"OAPL": {16: 2, 200: 1}, "GRPO-clip": {16: 0, 200: 3}}
    rows = tuned(lambda objective, lag, setting: 3 if best.get(objective, {}).get(lag) == setting else 1)
    assert best_setting(rows, "OAPL", 1) == best_setting(rows, "OAPL", 16) == 2
    assert best_setting(rows, "OAPL", 64) == best_setting(rows, "OAPL", 400) == 1
    assert best_setting(rows, "GRPO-clip", 200) == 3
    with pytest.raises(SystemExit, match="run `tune` first"):
        best_setting({}, "OAPL", 16)


def test_tables_and_pictures_of_a_partial_map(tmp_path):
    rows = tuned(lambda *_: 2)
    for objective, shares in {"OAPL": (0.25, 0.5), "GRPO-clip": (0.25, 0.25)}.items():
        for seed, share in enumerate(shares):
            correct = [int(16 * share)] * HELD_OUT
            one = {"step": 0, "n": 16, "correct": correct, "pass_at_k": {"1": share}}
            curves = {name: [0.1, None] for name in ("reward_mean", "entropy", "tokens_generated")}
            row = {"kind": "map", "objective": objective, "lag": 64, "seed": seed, "curves": curves}
            rows[f"{objective}{seed}"] = row | {"evaluations": [one]}
    assert "| OAPL | – | – | 0.375 ± 0.125 (2) | – | – |" in map_table(rows)
    assert crossover(rows) == ["- L=64: OAPL − GRPO-clip (the best other) = +0.125 ± 0.125"]
    assert overtakes(rows) == []
    assert all(path.stat().st_size > 0 for path in draw(rows, tmp_path))
    assert "### Variants" in report(rows)


def test_where_one_overtakes_the_other():
    def grid(ours, theirs):
        last = lambda right: [{"n": 16, "correct": [right] * HELD_OUT}]  # noqa: E731
        return {
            f"{objective}{lag}": {"kind": "map", "objective": objective, "lag": lag, "evaluations": last(right)}
            for objective, row in {"OAPL": ours, "GRPO-clip": theirs}.items()
            for lag, right in zip(LAGS, row, strict=True)
        }

    level = [8] * len(LAGS)
    assert overtakes(grid([4, 6, 7, 9, 9], level))[0] == pytest.approx(math.sqrt(64 * 200))
    assert set(overtakes(grid([9] * 5, level))) == {LAGS[0]}
    assert overtakes(grid([9, 9, 9, 9, 4], level)) == []


def test_the_bias_of_the_value_is_of_order_one_over_g():
    assert bias(0.5, 1) == pytest.approx(0.5 - math.log(0.5 + 0.5 * math.e))
    for share in (0.1, 0.5):
        scaled = [size * bias(share, size) for size in SIZES]
        assert all(b < 0 for b in scaled)
        assert scaled[-1] == pytest.approx(scaled[-2], rel=0.02)


def test_the_page_says_what_the_committed_data_say():
    page = PAGE.read_text()
    assert with_tables(page, report(read_rows(DATA))) == page, "run python -m experiments.lag_map_report"


@pytest.mark.live
def test_a_cell_runs_once_and_keeps_what_the_report_needs(micro_model, tmp_path, capsys):
    settings = {"model.path": str(micro_model), "schedule.steps": 4, "schedule.lag": 2, "data.held_out": 4}
    cells = [Cell("a/b", {"kind": "map", "objective": "OAPL", "lag": 2, "seed": 0}, settings)]
    bad = Cell("bad", {}, {"schedule.lag": 0})
    out = tmp_path / "data.jsonl"
    assert run_cells(RECIPE, [*cells, bad], out, tmp_path / "runs", 1) == 1
    (row,) = read_rows(out).values()
    assert [e["step"] for e in row["evaluations"]] == [0, 4]
    assert len(row["evaluations"][-1]["correct"]) == 4
    assert row["lag_max"] == 1
    assert not (tmp_path / "runs" / "a" / "b" / "rollouts").exists()
    assert "schedule.lag = 0" in json.loads(out.read_text().splitlines()[-1])["failed"]
    assert run_cells(RECIPE, cells, out, tmp_path / "runs", 1) == 0
    assert "1 of 1 cells are in" in capsys.readouterr().out
