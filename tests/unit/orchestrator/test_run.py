"""A run directory: one process at a time, one recipe for its life, its state that survives."""

import json
import shutil

import pytest

from oapl_engine.distributed import ALONE, Ranks
from oapl_engine.errors import ConfigError
from oapl_engine.orchestrator.run import combine_handlers, open_run, save_recipe
from oapl_engine.scheduler import events as e
from tests.support.rollouts import plain_group


def test_a_second_process_is_refused_while_the_first_runs(make_run, make_recipe):
    make_run()
    with pytest.raises(ConfigError, match="another process runs there now"), open_run(make_recipe(), ALONE):
        pass


def test_another_recipe_is_refused_by_its_field(make_recipe):
    with open_run(make_recipe(), ALONE) as run:
        save_recipe(run)
        run.log.append(plain_group(1))
    with (
        pytest.raises(ConfigError, match=r"schedule\.lag was 64, now 8"),
        open_run(make_recipe("--schedule.lag", 8), ALONE),
    ):
        pass
    with open_run(make_recipe("--run.threads", 2, "--rollout.memory_share", 0.5), ALONE) as resumed:
        assert (resumed.recipe.run.threads, resumed.recipe.rollout.memory_share) == (2, 0.5)


def test_bad_input_leaves_the_directory_unbound(make_recipe):
    """Until save_recipe is called, a later run may bring another recipe."""
    with open_run(make_recipe(), ALONE):
        pass
    with open_run(make_recipe("--schedule.lag", 8), ALONE) as run:
        assert run.recipe.schedule.lag == 8


def test_a_start_that_failed_before_its_first_group_claims_nothing(make_recipe, tmp_path):
    """An engine that did not start, a refused publish: the recipe may be corrected, and nothing of the start stays."""
    with open_run(make_recipe(), ALONE) as run:
        save_recipe(run)
        run.journal.published(0, 0, "aa", 0)
        (run.directory / "eval.jsonl").write_text("{}\n")
    with open_run(make_recipe("--schedule.lag", 8), ALONE) as corrected:
        assert corrected.journal.versions() == []
        assert not (tmp_path / "run" / "eval.jsonl").exists()


def test_bad_input_leaves_no_directory_behind(make_recipe, tmp_path):
    folder = tmp_path / "new" / "parent" / "run"
    with pytest.raises(ConfigError, match="held out"), open_run(make_recipe("--run.dir", folder), ALONE):
        raise ConfigError("held out")
    assert not (tmp_path / "new").exists()
    folder.parent.mkdir(parents=True)
    with pytest.raises(ConfigError), open_run(make_recipe("--run.dir", folder), ALONE):
        raise ConfigError("held out")
    assert folder.parent.is_dir()


def change(path):
    path.write_text(path.read_text() + " ")


def offline(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("{}\n")
    return [
        "--schedule.mode",
        "offline",
        "--data.source",
        "jsonl",
        "--data.path",
        path,
        "--data.options={}",
    ]


def own_objective(tmp_path, monkeypatch):
    (tmp_path / "bound_objective.py").write_text(
        "from oapl_kernels.objectives import OBJECTIVES\nf = OBJECTIVES['oapl']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return ["--objective.name", "bound_objective:f"]


def test_changed_contents_are_refused_by_name(make_recipe, tmp_path, monkeypatch):
    """The data file, the model, a user's own code, the ranks: each is part of what a resume must find as it was."""
    words = [*offline(tmp_path), *own_objective(tmp_path, monkeypatch)]
    model = shutil.copytree(make_recipe().model.path, tmp_path / "model")
    words += ["--model.path", model]
    with open_run(make_recipe(*words), ALONE) as run:
        save_recipe(run)
        run.log.append(plain_group(1))
    for path, name in (
        (tmp_path / "rollouts.jsonl", "data.path"),
        (tmp_path / "bound_objective.py", "objective.name"),
        (model / "config.json", "model.path"),
    ):
        before = path.read_text()
        change(path)
        with pytest.raises(ConfigError, match=f"other contents of {name}"), open_run(make_recipe(*words), ALONE):
            pass
        path.write_text(before)
    with open_run(make_recipe(*words), ALONE):
        pass
    file = tmp_path / "run" / "bound.json"
    file.write_text(file.read_text().replace('"ranks": 1', '"ranks": 2'))
    with (
        pytest.raises(ConfigError, match="was written by 2 ranks, now there are 1"),
        open_run(make_recipe(*words), ALONE),
    ):
        pass


@pytest.mark.parametrize("content", ["{}", "[]", '{"ranks": 1}', "{"])
def test_a_damaged_file_of_what_binds_is_named(make_recipe, tmp_path, content):
    with open_run(make_recipe(), ALONE) as run:
        save_recipe(run)
        run.log.append(plain_group(1))
    (tmp_path / "run" / "bound.json").write_text(content)
    with pytest.raises(ConfigError, match=r"bound\.json is damaged"), open_run(make_recipe(), ALONE):
        pass


def test_a_run_that_lost_its_journal_is_not_continued(make_recipe, tmp_path):
    """It would train the same rollouts again, or say that nothing was learned."""
    with open_run(make_recipe(), ALONE) as run:
        save_recipe(run)
    (tmp_path / "run" / "checkpoints" / "step_000004").mkdir(parents=True)
    (tmp_path / "run" / "journal.sqlite").unlink()
    with pytest.raises(ConfigError, match=r"has checkpoints and no journal\.sqlite"), open_run(make_recipe(), ALONE):
        pass


def test_other_package_versions_are_said(make_recipe, tmp_path, capsys):
    with open_run(make_recipe(), ALONE) as run:
        save_recipe(run)
        run.log.append(plain_group(1))
    file = tmp_path / "run" / "bound.json"
    bound = json.loads(file.read_text())
    bound["packages"]["torch"] = "1.13"
    file.write_text(json.dumps(bound))
    with open_run(make_recipe(), ALONE):
        pass
    assert "started with torch 1.13, now it is" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_named(make_recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="name a directory you may write to"),
        open_run(make_recipe("--run.dir", tmp_path / "file"), ALONE),
    ):
        pass


def test_the_newest_published_version_is_found_again(make_run, make_recipe, tmp_path):
    with open_run(make_recipe(), ALONE) as first:
        first.journal.published(0, 0, "aa", 0)
        first.journal.published(1, 64, "bb", 0)
    with open_run(make_recipe(), ALONE) as resumed:
        assert resumed.version == 1


def test_cleared_groups_end_in_their_column(make_run):
    run = make_run()
    run.log.append(plain_group(1))
    handlers = run.handlers()
    handlers[e.Clear](e.Clear(("0.p1.0",)))
    assert run.journal.dispositions() == {"0.p1.0.0": "cleared", "0.p1.0.1": "cleared"}
    run.log.append(plain_group(2))
    handlers[e.Resample](e.Resample(("0.p2.0",)))
    assert run.journal.dispositions()["0.p2.0.0"] == "dropped:resampled"


def test_a_rank_alone_must_have_all_groups(make_run):
    run = make_run()
    run.log.append(plain_group(1))
    with pytest.raises(KeyError):
        run.local_groups(["0.p1.0", "0.p2.0"])
    run.ranks = Ranks(1, 2)
    assert [group.id for group in run.local_groups(["0.p1.0", "0.p2.0"])] == ["0.p1.0"]


def test_handlers_of_one_command_keep_the_order_given():
    first, second, third = (lambda _, n=n: n for n in range(3))
    combined = combine_handlers({e.Checkpoint: first}, {e.Checkpoint: second, e.Train: third})
    assert combined == {e.Checkpoint: [first, second], e.Train: [third]}
