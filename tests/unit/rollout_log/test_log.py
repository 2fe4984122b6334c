"""Log, journal and ledger: nothing that was acknowledged is lost, changed or counted twice."""

import json
import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from oapl_engine.errors import RunError
from oapl_engine.rollout_log.database import CorruptLogError, file_system
from oapl_engine.rollout_log.journal import Journal
from oapl_engine.rollout_log.ledger import Ledger
from oapl_engine.rollout_log.log import RolloutLog
from oapl_engine.samples import Rollout
from tests.support.rollouts import plain_group


def same(a, b):
    for name in Rollout.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y, name


def test_a_group_comes_back_as_it_went_in(tmp_path):
    log = RolloutLog(tmp_path / "rank0.sqlite")
    group = plain_group("a")
    log.append(group)
    back = RolloutLog(tmp_path / "rank0.sqlite").group(group.id)
    assert (back.version, back.prompt.record) == (3, {"answer": "12"})
    for a, b in zip(group.rollouts, back.rollouts, strict=True):
        same(a, b)


def test_a_key_is_stored_once(tmp_path):
    log = RolloutLog(tmp_path / "r.sqlite")
    log.append(plain_group("a"))
    with pytest.raises(ValueError, match=r"0\.pa\.0"):
        log.append(plain_group("a"))
    assert len(list(log.rollouts())) == 2


def test_a_flipped_byte_is_noticed_and_named(tmp_path):
    path = tmp_path / "r.sqlite"
    log = RolloutLog(path)
    log.append(plain_group("a"))
    log.close()
    db = sqlite3.connect(path)
    db.execute("UPDATE rollout SET token_ids = x'00000000010000000200000003000000ff000000' WHERE sample = 0")
    db.commit()
    db.close()
    with pytest.raises(CorruptLogError, match=r"0\.pa\.0\.0"):
        RolloutLog(path).group("0.pa.0")


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "r.sqlite").write_bytes(b"garbage" * 1000)
    with pytest.raises(CorruptLogError, match=r"r\.sqlite"):
        RolloutLog(tmp_path / "r.sqlite")


def _writer(path, ready):
    log = RolloutLog(path)
    ready.set()
    for i in range(100000):
        log.append(plain_group(i))
        with open(f"{path}.acknowledged", "a") as file:
            file.write(f"0.p{i}.0\n")


def test_a_killed_writer_loses_nothing_it_acknowledged(tmp_path):
    path = tmp_path / "r.sqlite"
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writer = context.Process(target=_writer, args=(path, ready))
    writer.start()
    ready.wait(30)
    time.sleep(0.5)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    acknowledged = Path(f"{path}.acknowledged").read_text().split()
    log = RolloutLog(path)
    stored = log.group_keys()
    assert acknowledged
    assert set(acknowledged) <= set(stored)
    assert all(len(log.group(key).rollouts) == 2 for key in stored), "half a group was stored"


def test_journal_survives_and_a_replayed_step_changes_nothing(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    journal.published(0, 0, "aa", 0)
    for _ in range(2):
        journal.intent(1, 0, ("g1", "g2"))
        journal.done(1, 0, ("g1", "g2"), ["g1.0", "g2.0"], "aa")
    journal.intent(2, 0, ("g3",))
    again = Journal(tmp_path / "journal.sqlite")
    assert [(s.step, s.groups) for s in again.steps()] == [(1, ("g1", "g2")), (2, ("g3",))]
    assert again.uses() == {"g1.0": [1], "g2.0": [1]}
    assert again.versions() == [(0, 0)]
    with pytest.raises(sqlite3.IntegrityError):
        again.published(0, 5, "bb", 0)
    again.published(1, 5, "bb", 0)  # the failed one left no transaction open
    assert again.versions() == [(0, 0), (1, 5)]


def test_ledger_puts_every_token_in_one_column(tmp_path):
    """Ledger puts every token in one column however often it is read."""
    log, journal = RolloutLog(tmp_path / "r.sqlite"), Journal(tmp_path / "journal.sqlite")
    kept = Ledger(log, journal)
    for name, status in [("a", "scored"), ("b", "scored"), ("c", "aborted"), ("d", "invalid"), ("e", "scored")]:
        log.append(plain_group(name, status))
        kept.read()
    assert kept.read()["waiting"] == 9
    assert journal.done(1, 0, ("0.pa.0",), ["0.pa.0.0", "0.pa.0.1"], "aa") == "aa"
    assert journal.done(1, 0, ("0.pa.0",), [], "bb") == "aa", "a replay keeps and returns what was first"
    journal.dispose(dict.fromkeys(["0.pb.0.0", "0.pb.0.1"], "dropped:equal_rewards"))
    journal.count_tokens(0, "evaluation", 7)
    expected = {"trained": 3, "dropped:equal_rewards": 3, "aborted": 3, "invalid": 3, "waiting": 3, "evaluation": 7}
    for ledger in (kept, kept, Ledger(log, journal)):
        columns = ledger.read(engine_tokens=30)
        assert columns == {**expected, "cleared": 0, "lost": 8}
        assert sum(columns.values()) == 30
        assert ledger.generated() == 15
        assert ledger.invalid_counts() == (2, 8)
    journal.done(2, 0, ("0.pa.0",), ["0.pa.0.0"], "cc")  # a second epoch
    journal.dispose({"0.pa.0.0": "cleared"})
    assert kept.read(30) == columns
    json.dumps(columns)


def test_file_system_is_known(tmp_path):
    assert file_system(tmp_path)


def everything(folder):
    """Name, time and content of every file."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_a_reader_makes_and_changes_nothing(tmp_path):
    for opened, name in ((RolloutLog, "a file?#1%.sqlite"), (Journal, "journal.sqlite")):
        opened(tmp_path / name).close()
    before = everything(tmp_path)
    assert RolloutLog.reading(tmp_path / "a file?#1%.sqlite").group_keys() == []
    assert Journal.reading(tmp_path / "journal.sqlite").uses() == {}
    with pytest.raises(RunError, match="readonly"):
        Journal.reading(tmp_path / "journal.sqlite").count_tokens(0, "engine", 1)
    with pytest.raises(RunError, match=r"missing\.sqlite: unable to open"):
        RolloutLog.reading(tmp_path / "missing.sqlite")
    assert everything(tmp_path) == before


def test_a_reader_sees_what_a_live_writer_committed(tmp_path):
    path = tmp_path / "r.sqlite"
    log = RolloutLog(path)
    log.append(plain_group("a"))
    reader = RolloutLog.reading(path)
    assert reader.group_keys() == ["0.pa.0"]
    log.append(plain_group("b"))
    assert reader.group_keys() == RolloutLog.reading(path).group_keys() == ["0.pa.0", "0.pb.0"]
    log.append(plain_group("c"))  # the readers hold no lock


def test_a_reader_sees_what_a_killed_writer_committed(tmp_path):
    path, copy = tmp_path / "r.sqlite", tmp_path / "copy"
    log = RolloutLog(path)
    log.append(plain_group("a"))
    copy.mkdir()
    for file in tmp_path.glob("r.sqlite*"):  # as a SIGKILL leaves them
        (copy / file.name).write_bytes(file.read_bytes())
    assert (copy / "r.sqlite-wal").stat().st_size > 0
    assert RolloutLog.reading(copy / "r.sqlite").group_keys() == ["0.pa.0"]


def test_a_page_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "r.sqlite"
    log = RolloutLog(path)
    for name in range(200):
        log.append(plain_group(name))
    log.close()
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xff" * (len(content) - 8192)
    path.write_bytes(content)
    with pytest.raises(CorruptLogError, match=r"r\.sqlite: .*restore it from a copy"):
        list(RolloutLog.reading(path).rollouts())
