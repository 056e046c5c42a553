"""The figures in docs/architectures.md are what the command prints today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flows import cli

PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE)
NAMES = sorted({name for name, _ in ROWS})


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.call(["model", *arguments]) == 0
    return capsys.readouterr().out


def test_every_model_is_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.split()[0] for line in printed(capsys, "list").splitlines()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_of_the_tables(capsys: pytest.CaptureFixture[str], name: str) -> None:
    page = printed(capsys, "show", name)
    cells = [cell for row, text in ROWS if row == name for cell in text.split(" | ")]
    figures = [cell for cell in cells if re.fullmatch(r"[\d,.]+( \w+)?", cell)]
    assert len(figures) == 2 + 3 + 6
    for figure in figures:
        assert figure in page, figure
    experts = next((cell for cell in cells if re.fullmatch(r"\d+, \d+, \d+", cell)), None)
    if experts is None:
        assert "dense" in cells and "Experts" not in page
    else:
        counts = re.findall(r"(?:in a layer|of these for a token|shared experts) +(\d+)$", page, re.MULTILINE)
        assert ", ".join(counts) == experts


def test_the_whole_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "show", "v3") in PAGE
