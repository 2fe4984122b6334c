"""What a run stands on: the code of the user's own, with what it imports beside it."""

import importlib
import sys

import pytest

from oapl_engine.fingerprint import code_fingerprint

FILES = {
    "own_pkg/__init__.py": "",
    "own_pkg/rewards.py": "from . import near\nfrom own_pkg.deep.far import value\nimport own_beside, numpy\n",
    "own_pkg/near.py": "",
    "own_pkg/deep/__init__.py": "",
    "own_pkg/deep/far.py": "from ..cycle import x\nvalue = 1\n",
    "own_pkg/cycle.py": "import own_pkg.rewards\nx = 1\n",
    "own_pkg/unused.py": "",
    "own_beside.py": "def f():\n    import own_later\n",
    "own_later.py": "",
    "own_other.py": "def (",
}
READ = set(FILES) - {"own_pkg/unused.py", "own_other.py"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_pkg", raising=False)  # of another test's folder
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize("name", sorted(FILES))
def test_own_code_is_what_it_imports_too(folder, name):
    """A helper beside the module belongs to it, also one that is imported later; what it never names does not."""
    before = code_fingerprint("own_pkg.rewards:score")
    assert before == code_fingerprint("own_pkg.rewards:other")
    (folder / name).write_text(FILES[name] + "\n")
    assert (code_fingerprint("own_pkg.rewards:score") != before) == (name in READ)


def test_code_of_an_installed_module_is_itself_alone():
    assert code_fingerprint("tomli_w:dumps") != code_fingerprint("msgpack:packb")
    assert code_fingerprint("exact") is None
    assert code_fingerprint("sys:exit") is None
