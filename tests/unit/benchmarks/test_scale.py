"""`python -m benchmarks scale`: tables, advice, picture; a run's own machine; bad input. And the report of modes."""

import json
import shutil

import pytest

from benchmarks import modes, scale
from benchmarks._machine import fit_machine
from oapl_engine.scheduler import events as e
from tests.conftest import ROOT

RECORDED = ROOT / "tests" / "unit" / "scheduler" / "recorded"


@pytest.fixture
def run(tmp_path):
    """A run directory with the record of a real run."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(RECORDED / "phased_two_ranks.jsonl", folder / "events.jsonl")
    shutil.copy(RECORDED / "phased_two_ranks.toml", folder / "config.toml")
    return folder


def test_it_scales_advises_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scale, "SMALL", (1, 8))
    monkeypatch.setattr(scale, "LAGS", {"sync": (1,), "phased": (16,), "phased keep": (16,), "async": (16, 50)})
    json_file, svg = tmp_path / "scale.json", tmp_path / "scale.svg"
    assert scale.main(["--devices", "8", "--json", str(json_file), "--svg", str(svg)]) == 0
    out = capsys.readouterr().out
    assert out.count("for this machine take mode = ") == 2
    figures = json.loads(json_file.read_text())
    assert {c["mode"] for c in figures["modes"]} == {"sync", "phased", "phased keep", "async"}
    by_lag = {c["lag"]: c["tokens_per_second"] for c in figures["modes"] if c["mode"] == "async"}
    assert by_lag[50] > by_lag[16]
    assert "<svg" in svg.read_text()


def test_the_machine_of_a_run(run, capsys):
    assert scale.main(["--run", str(run), "--run", str(run)]) == 0
    out = capsys.readouterr().out
    assert "for this machine take mode = " in out
    assert "bursts of one size" in out, "nothing is said of what it cannot know"


def test_the_committed_figures_meet_the_bar():
    """The committed figures are of this format and meet the bar."""
    figures = json.loads((ROOT / "benchmarks" / "data" / "scale.json").read_text())
    assert [c["devices"] for c in figures["scaling"]] == list(scale.SCALES)
    for c in figures["scaling"]:
        assert c["training_idle"] <= scale.TRAINING_IDLE
        assert c["generation_idle"] <= scale.GENERATION_IDLE


@pytest.mark.parametrize("words", [["--devices", "many"], ["--devices", "1"], ["--run", "nowhere"]])
def test_bad_input_is_named(words, capsys):
    assert scale.main(words) == 2
    assert words[-1] in capsys.readouterr().err


def test_modes_reports_finished_runs(run, tmp_path, capsys):
    """The report alone, on recorded runs: what it says adds up."""
    for name in ("sync", "phased"):
        shutil.copytree(run, tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "checkpoints" / "step_000016").mkdir(parents=True)
        seconds = {"time/generate": 0.1, "time/train": 0.2, "time/publish": None, "time/attest": 0.0}
        rows = [{"step": s, "tokens/trained": 100.0, "off_policy/max": s % 4, **seconds} for s in range(1, 17)]
        (tmp_path / "runs" / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "modes.json"
    assert modes.main(["--model", "smollm2", "--runs", str(tmp_path / "runs"), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["phased_over_sync"] == pytest.approx(1)
    assert figures["runs"]["phased"]["phase_seconds"] == pytest.approx(16 * 0.3)
    assert figures["share_of_bound"] == pytest.approx(16 * 0.3 / figures["runs"]["phased"]["seconds"])
    assert 0.5 < figures["runs"]["phased"]["simulated"]["phased"] < 2


def test_a_machine_is_read_from_a_record():
    """Two bursts of different size give what a token costs alone and what each further sequence adds."""
    done = [e.GroupDone(f"g{i}", 80, 0) for i in range(6)]
    record = [
        (0.0, e.Submit(2)), (1.0, done[0]), (3.2, done[1]), (3.2, e.Train(1, ())), (5.2, e.StepDone(1)),
        (5.2, e.Publish(1)), (5.5, e.Published(1)), (5.5, e.Submit(4)), (9.7, done[2]), (9.8, done[3]), (9.9, done[4]),
        (10.0, done[5]), (10.3, e.Train(2, ())), (14.3, e.StepDone(2)),
    ]  # fmt: skip
    machine = fit_machine([record], group_size=8, slots=32)
    assert machine.costs == pytest.approx({"Train": 3.0, "Publish": 0.3})
    assert machine.tokens_mean == 10
    slow, fast = ((machine.token_seconds + machine.crowding * n) * 10 for n in (32, 16))
    assert (fast, slow) == pytest.approx((3.2, 4.5))
