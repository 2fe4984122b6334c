"""Generated parts of README.md and docs/ are up to date, and pages name only what exists."""

import re

import pytest

from benchmarks import docs
from oapl_engine.cli import _parser
from tests.conftest import ROOT

PAGES = [*docs.pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", docs.pages(), ids=lambda page: page.name)
def test_regenerating_a_page_changes_nothing(page):
    assert docs.generate(page) == page.read_text(), "make docs"


def test_a_part_that_is_changed_by_hand_is_noticed(tmp_path):
    page = tmp_path / "metrics.md"
    text = (ROOT / "docs" / "metrics.md").read_text()
    page.write_text(text.replace("learning rate", "learning pace"))
    assert docs.generate(page) == text


def test_every_part_is_shown_somewhere():
    shown = {name for page in docs.pages() for name, _ in docs.PART.findall(page.read_text())}
    assert shown == docs.PARTS.keys()


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_of_a_page_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
    for path in re.findall(r"`((?:oapl_engine|tests|benchmarks|experiments|csrc|kernels)/[\w/.*]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_exist(page):
    text = page.read_text()
    for name in re.findall(r"python -m benchmarks (\w+)", text):
        assert name == "NAME" or (ROOT / "benchmarks" / f"{name}.py").exists(), name
    for name in re.findall(r"python -m experiments\.(\w+)", text):
        assert (ROOT / "experiments" / f"{name}.py").exists(), name
    for path in re.findall(r"python -m pytest (\S+?)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`make ([\w-]+)", text):
        assert page.name == "CHANGELOG.md" or f"\n{name}:" in (ROOT / "Makefile").read_text(), name
    for line in re.findall(r"`oapl (figure [^`]+)`", text):
        _parser().parse_args(line.split())
