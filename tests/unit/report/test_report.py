"""metrics.jsonl always has every key and never a number that JSON cannot hold; a run can be drawn; errors are named."""

import json
import os
import re
import sys

import pytest

from oapl_engine.config import ReportConfig
from oapl_engine.errors import ConfigError
from oapl_engine.report.display import Display
from oapl_engine.report.figure import plot_run
from oapl_engine.report.gantt import merged, plot_gantt, work_spans
from oapl_engine.report.metrics import METRICS, RENAMED, MetricsWriter, read_evaluations, read_metrics
from oapl_engine.stopwatch import Stopwatch


def test_every_key_is_written_and_nan_becomes_null(tmp_path):
    MetricsWriter(tmp_path).write({"step": 1, "loss": float("nan"), "reward/all/mean": 0.5})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert tuple(row) == tuple(METRICS)
    assert (row["step"], row["loss"], row["reward/all/mean"], row["optim/grad_norm"]) == (1, None, 0.5, None)


def test_a_key_that_is_not_in_the_schema_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="lossy"):
        MetricsWriter(tmp_path).write({"step": 1, "lossy": 0.1})


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_metric_names_are_refused_with_the_new(tmp_path, old, new):
    """When writing, and when reading the file of a run of version 0.1."""
    assert new in METRICS
    with pytest.raises(ValueError, match=f"{old} is now {re.escape(new)}"):
        MetricsWriter(tmp_path).write({"step": 1, old: 0.1})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, old: 0.1}) + "\n")
    with pytest.raises(ConfigError, match=f"0.1: {old} is now {re.escape(new)}"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_step_written_twice_counts_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step, loss in ((1, 0.5), (2, 0.4), (2, 0.3)):
        writer.write({"step": step, "loss": loss})
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0.5, 0.3]


@pytest.mark.parametrize("field", [{"tensorboard": True}, {"wandb": "project"}])
def test_a_tracker_that_is_not_installed_is_named(field, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install (tensorboard|wandb)"):
        MetricsWriter(tmp_path, ReportConfig(**field))


def test_a_run_is_drawn(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 20):
        writer.write(
            {"step": step, "reward/all/mean": step / 20, "off_policy/mean": float(step % 4), "log_ratio/std": 0.1}
        )
    evaluation = {"step": 19, "k": 1, "pass_at_k": 0.7, "standard_error": 0.05}
    (tmp_path / "eval.jsonl").write_text(json.dumps(evaluation) + "\n")
    plot_run(tmp_path, tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    assert len(re.findall(r'id="axes_\d"', text)) == 3
    with pytest.raises(ConfigError, match=r"\.svg, \.png or \.pdf"):
        plot_run(tmp_path, tmp_path / "run.doc")
    with pytest.raises(ConfigError, match="metrics"):
        plot_run(tmp_path / "nowhere", tmp_path / "run.svg")


EVENTS = [
    (10.0, "command", "Submit", {"n": 2}),
    (11.5, "event", "GroupDone", {"done_at": 11.0, "verify_seconds": 0.5}),
    (11.5, "command", "Train", {}),
    (14.0, "event", "GroupDone", {"done_at": 13.0, "verify_seconds": 0.25}),
    (14.0, "event", "StepDone", {}),
    (14.0, "command", "Publish", {}),
    (15.0, "event", "Published", {}),
    (15.0, "command", "Train", {}),
    (99.0, "event", "EngineReady", {}),
]


def test_a_gantt_shows_what_overlaps(tmp_path):
    """Groups that end while a step is trained are told at their own time; a killed run's last command has no end."""
    rows = [{"at": at, "kind": kind, "name": name, **more} for at, kind, name, more in EVENTS]
    spans = work_spans(rows)
    assert spans["generate"] == [(10.0, 12.75)]
    assert spans["verify"] == [(10.5, 11.0), (12.75, 13.0)]
    assert (spans["train"], spans["publish"], spans["evaluate"]) == ([(11.5, 14.0)], [(14.0, 15.0)], [])
    assert merged([(3, 4), (0, 1), (1, 2)]) == [(0, 2), (3, 4)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_gantt(tmp_path, tmp_path / "gantt.svg")
    assert (tmp_path / "gantt.svg").read_text().count("PolyCollection") >= 4
    with pytest.raises(ConfigError, match=r"events\.jsonl"):
        plot_gantt(tmp_path / "nowhere", tmp_path / "gantt.svg")


def test_live_progress_is_one_line_that_says_the_same(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    display = Display(steps=10, window=2, live=True)
    try:
        display.show_phase("generate", "8 groups to go")
        row = {"reward/all/mean": 0.5, "loss": 0.1, "off_policy/mean": 3.0, "time/step": 2.0, "tokens/trained": 64.0}
        for step in (1, 2):
            display.show_step({"step": step, **row})
        with display.console.capture() as shown:
            display.console.print(display._table())
    finally:
        display.close()
    for word in ("generate", "8 groups to go", "step 2/10", "reward 0.500", "lag 3", "32 tokens/s", "16 s left"):
        assert word in shown.get()
    assert Display(1, silent=True, live=True).live is None, "other ranks say nothing"


def test_plain_progress_says_phase_step_reward_and_lag(capsys):
    display = Display(steps=10, window=2, live=False)
    display.show_phase("generate", "8 groups to go")
    for step in (1, 2):
        row = {
            "step": step,
            "reward/all/mean": 0.5,
            "loss": 0.1,
            "off_policy/mean": 3.0,
            "time/step": 2.0,
            "tokens/trained": 64.0,
        }
        display.show_step(row)
    text = capsys.readouterr().err
    assert "generate 8 groups to go" in text
    assert "step 2/10  reward 0.500  loss 0.1000  lag 3  32 tokens/s  16 s left" in text


def test_the_stopwatch_accounts_for_all_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    watch = Stopwatch()
    with watch.measure("train"):
        now[0] += 3
    now[0] += 2
    watch.add("verify", 9.0)
    taken = watch.take()
    assert taken == {"time/train": 3, "time/verify": 9, "time/idle": 2, "time/step": 5}
    assert watch.take() == {"time/idle": 0, "time/step": 0}


def test_a_kill_in_the_middle_of_a_line_costs_that_line(tmp_path):
    """Metrics and events: a run is drawn, and the resumed run adds to what was whole."""
    MetricsWriter(tmp_path).write({"step": 1, "off_policy/mean": 0.0, "reward/all/mean": 0.5})
    rows = [{"at": at, "kind": kind, "name": name, **more} for at, kind, name, more in EVENTS]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in ("metrics.jsonl", "eval.jsonl", "events.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"step": 2, "lo')
    plot_run(tmp_path, tmp_path / "run.svg")
    plot_gantt(tmp_path, tmp_path / "gantt.svg")
    assert read_evaluations(tmp_path) == {}
    MetricsWriter(tmp_path).write({"step": 2})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    MetricsWriter(tmp_path).write({"step": 1, "off_policy/mean": 0.0})
    with pytest.raises(ConfigError, match=r"run\.svg cannot be written"):
        plot_run(tmp_path, tmp_path / "metrics.jsonl" / "run.svg")


def test_progress_that_nobody_reads_falls_silent(monkeypatch):
    """rich's own console would end the thread that prints."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8", closefd=False) as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        display = Display(steps=1, live=False)
        display.say("a line")
        display.say("another")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # so that closing finds a reader
    os.close(write)
    assert display.console.quiet
