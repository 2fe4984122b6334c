"""The SmolLM2 series: valid recipes, even seeds, and a page that says what its data say."""

from experiments.cells import ROOT, as_overrides, read_rows
from experiments.smollm2 import DATA, LAG, OBJECTIVES, RECIPE, STEPS, cells, table
from oapl_engine.config import load_recipe


def test_the_series_is_even_and_every_cell_is_a_valid_recipe():
    made = cells(3)
    assert len({cell.name for cell in made}) == len(made) == 3 * len(OBJECTIVES)
    for cell in made:
        recipe = load_recipe(RECIPE, as_overrides(cell.settings))
        assert (recipe.schedule.lag, recipe.schedule.steps) == (LAG, STEPS)
        assert recipe.objective.name == OBJECTIVES[cell.tags["objective"]]["objective.name"]


def test_the_table_pairs_problems_and_averages_seeds():
    def row(objective, seed, before, after):
        counts = [{"n": 2, "correct": c, "pass_at_k": {"1": sum(c) / 2 / len(c)}} for c in (before, after)]
        return {"objective": objective, "seed": seed, "evaluations": counts}

    rows = {f"OAPL/seed{i}": row("OAPL", i, [0, 1, 1, 2], [1, 2, 2, 2 - i]) for i in range(2)}
    lines = table(rows)
    assert lines[2:4] == [
        "| OAPL/seed0 | 0.500 | 0.875 | +0.375 ± 0.125 |",
        "| OAPL/seed1 | 0.500 | 0.750 | +0.250 ± 0.250 |",
    ]
    assert lines[4] == "| OAPL, mean of 2 seeds | | | +0.312 ± 0.062 |"


def test_the_page_shows_the_data():
    page = (ROOT / "docs" / "results.md").read_text()
    assert "\n".join(table(read_rows(DATA))) in page
