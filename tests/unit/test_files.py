"""JSON lines outlive a kill, damage is named, texts are replaced whole, and files follow umask."""

import errno
import json
import os

import pytest

from oapl_engine import files
from oapl_engine.errors import ConfigError, RunError
from oapl_engine.files import (
    append_jsonl,
    follow_umask,
    name_disk_errors,
    open_jsonl,
    read_json,
    read_jsonl,
    replace_text,
)

TORN = [b'{"step": 3, "lo', b'{"step": 3}', b"\0" * 40, b'{"step": 3, "lo\n', b"[1]\n", b"\xff\xfe\n", b"\n"]


@pytest.fixture(params=TORN)
def torn(tmp_path, request):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"step": 1}, {"step": 2, "text": "größer\u2028"}])
    with open(path, "ab") as file:
        file.write(request.param)
    return path


def test_a_torn_last_line_is_left_out(torn):
    assert [row["step"] for row in read_jsonl(torn)] == [1, 2]


def test_a_line_after_a_torn_one_is_not_glued_to_it(torn):
    append_jsonl(torn, [{"step": 3}, {"step": 4}])
    assert [row["step"] for row in read_jsonl(torn)] == [1, 2, 3, 4]
    assert torn.read_bytes().count(b"\n") == 4


def test_a_torn_line_is_cut_off_whatever_its_length(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 8)
    path = tmp_path / "rows.jsonl"
    for first in (b"", b'{"step": 1}\n'):
        for length in range(40):
            path.write_bytes(first + b"x" * length)
            append_jsonl(path, [{"step": 2}])
            assert path.read_bytes() == first + b'{"step": 2}\n'


def test_a_whole_file_is_only_added_to(tmp_path):
    path = tmp_path / "rows.jsonl"
    for step in range(3):
        with open_jsonl(path) as file:
            file.write(b'{"step": %d}\n' % step)
    assert [row["step"] for row in read_jsonl(path)] == [0, 1, 2]
    assert read_jsonl(tmp_path / "missing") == []


@pytest.mark.parametrize("line", [b"{", b"3", b"\xff", b""])
def test_a_broken_line_before_the_last_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl line 2 is damaged"):
        read_jsonl(path)


def test_a_damaged_json_file_is_named(tmp_path):
    path = tmp_path / "probe.json"
    replace_text(path, json.dumps([[1, 2]]))
    assert read_json(path) == [[1, 2]]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=r"probe\.json is damaged.*remove it"):
        read_json(path)


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    replace_text(path, "größer")
    assert path.read_bytes() == "größer".encode()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "other")
    assert path.read_bytes() == "größer".encode()


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_follow_umask(tmp_path, umask, rights):
    before = os.umask(umask)
    try:
        folder = tmp_path / "model"
        (folder / "trainer").mkdir(parents=True)
        for name in ("model.safetensors", "trainer/rng.safetensors"):
            (folder / name).touch()
            (folder / name).chmod(0o600)
        follow_umask(folder)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {rights}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_file_of_another_user_is_named(tmp_path, number):
    """As after one start with sudo, or on a disk that went read-only."""
    file = str(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match=r"metrics\.jsonl: .*check who owns it"), name_disk_errors(tmp_path):
        raise OSError(number, os.strerror(number), file)
    with pytest.raises(OSError, match="a device"), name_disk_errors(tmp_path):
        raise OSError(errno.EACCES, "a device")
