"""docs/reference/architectures.md has a row for every architecture that is tried."""

import re
from pathlib import Path

import pytest
from architectures import COMMON, DECODED, RECURRENT, REFUSED, SCALED

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "architectures.md"
ROWS = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
DRAFTS = {row[0].removeprefix("| "): row[1] for row in ROWS if len(row) > 5}
REFUSED_ALONE = [name for name in REFUSED if name not in DECODED]
EXPECTED = {
    **dict.fromkeys((*COMMON, *DECODED, *SCALED), "trees"),
    **dict.fromkeys(RECURRENT, "chains"),
    **dict.fromkeys((*REFUSED_ALONE, "falcon, alibi=True"), "refused"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_has_a_row_that_says_how_it_is_decoded(name):
    assert DRAFTS[name] == EXPECTED[name], "run nox -s architectures"


def test_nothing_else_has_a_row():
    assert {*DRAFTS} - {*EXPECTED} == {"architecture"}
    assert re.search(r"with transformers \d+\.\d+", PAGE.read_text(encoding="utf-8"))
