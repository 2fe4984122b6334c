"""Pages of docs/ and the code blocks in them."""

import re
import tomllib
from typing import NamedTuple

import pytest

from tests.conftest import ROOT


class Example(NamedTuple):
    """A section's example: the name of the Python module, its path, and the recipe's tables."""

    module: str
    tables: dict


@pytest.fixture
def example(tmp_path, monkeypatch):
    """example(section): the Python block of a section of docs/extending.md, importable from a folder of its own."""

    def write(section):
        page = (ROOT / "docs" / "extending.md").read_text()
        body = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        (code,) = re.findall(r"```python\n(.*?)```", body, re.S)
        (recipe,) = re.findall(r"```toml\n(.*?)```", body, re.S)
        name = re.match(r"# (\w+\.py)\n", code)[1]
        (tmp_path / name).write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        return Example(name.removesuffix(".py"), tomllib.loads(recipe))

    return write
