"""README and docs name what exists: links, keys, metrics, figures; commands say how they run."""

import re
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import results_page
from doc_commands import PAGES, ROOT, Block, _with, blocks, extras, overrides, spans

from medusa_exp.config import Config
from medusa_exp.data import forms, pairs, parsing, records, turns
from medusa_exp.runs.metric_table import METRICS, metric_of

README = ROOT / "README.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GROUPS = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
OPEN_KEYS = ("dataset.columns", "dataset.role_map", "dataset.sources", "tokenizer.special_tokens")
"""Keys that take any key below them."""
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def test_readme_is_short_and_says_what_people_search_for():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert "speculative decoding" in text.lower() and "Medusa heads" in text


def test_every_block_says_whether_it_is_run():
    assert [block.name for block in blocks() if block.mark is None] == []
    assert [block.name for block in blocks() if block.mark == "not run" and not block.words] == []
    assert len(blocks()) > 50


def test_settings_of_a_mark_take_the_place_of_those_of_the_command():
    command = "python -m medusa_exp -m a.b=1,2 'c=[x]' logger.mode=online"
    changed = _with(command, ["d=4", "a.b=9", "logger=none"], ["a.b=1", "e=5"])
    assert changed.split() == [*command.replace("a.b=1,2", "").split(), "d=4", "a.b=1", "e=5"]
    assert _with("wandb login", ["d=4"], ["e=5"]) == "wandb login"
    block = Block("p", 1, "sh", "", "run", "")
    assert block.name == "p:1"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [found[1] for found in _LINK.finditer(text) if "://" not in found[1]]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_results_are_what_the_script_writes():
    why = "run python scripts/results_page.py"
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page(), why
    text = README.read_text(encoding="utf-8")
    assert text == results_page.with_table(text), why


def test_every_figure_has_command_machine_date_and_commit():
    for path in results_page.RESULTS.glob("*.json"):
        found = results_page._read(path)
        origins = found.get("runs") or [found.get("machine", {})]
        for origin in origins:
            assert {"commit"} <= set(origin), path
            assert origin.get("date") or origin.get("time"), path
            assert origin.get("device") or origin.get("gpu") or origin.get("cpu"), path


def test_keys_that_pages_name_exist():
    known = {*_keys(Config()), *GROUPS}
    unknown = [
        f"{page}: {key}"
        for page, words in overrides()
        for key in (word.partition("=")[0].lstrip("+") for word in words)
        if key not in known and not key.startswith(("hydra", *OPEN_KEYS))
    ]
    assert unknown == []


def test_every_file_that_stages_leave_is_in_the_page_of_the_run_directory():
    page = (ROOT / "docs/reference/run_directory.md").read_text(encoding="utf-8")
    source = "".join(path.read_text("utf-8") for path in (ROOT / "src/medusa_exp").rglob("*.py"))
    left = set(re.findall(r"\b(?:out|run_dir) / \"([\w.]+)\"", source))
    assert len(left) > 15
    assert [name for name in left if not {f"`{name}`", f"`{name}/`"} & set(_code(page))] == []


def test_every_reason_to_drop_a_record_is_in_the_page_of_chats():
    page = (ROOT / "docs/guide/data.md").read_text(encoding="utf-8")
    table = page.partition("## What is dropped")[2].partition("\n\n`dataset.strict")[0]
    listed = {reason.strip().partition(" (")[0] for reason in re.split("[;|]", table)}
    reasons = {
        text
        for module in (forms, pairs, parsing, records, turns)
        for name, text in vars(module).items()
        if name.isupper() and name[0] != "_" and isinstance(text, str)
        if re.match("[a-z]+ ", text)
    }
    assert len(reasons) > 25 and sorted(reasons - listed) == []


def test_metrics_that_pages_name_exist():
    stages = {metric.name.partition("/")[0] for metric in METRICS}
    named = [
        (page, span)
        for page, span in spans()
        if re.fullmatch(r"[a-z]+/[a-z0-9_/]+", span) and span.partition("/")[0] in stages
    ]
    skipped = ("develop/add_a_", "reference/metrics")
    wrong = [x for x in named if not metric_of(x[1]) and not any(s in x[0] for s in skipped)]
    folders = [x for x in wrong if (ROOT / "src/medusa_exp" / x[1]).exists() or x[1][-1] == "/"]
    assert [x for x in wrong if x not in folders] == []
    assert len(named) > 30


def test_scripts_that_pages_name_exist_and_commands_stand_in_blocks():
    # docs/results.md has commands of the past, as they were.
    named = [(page, span.split()) for page, span in spans() if page != "docs/results.md"]
    scripts = [words[1] for _, words in named if words[0] == "python" and words[-1] != "python"]
    scripts = [path for path in scripts if path.endswith(".py")]
    assert len(scripts) > 5
    assert [path for path in scripts if not (ROOT / path).is_file()] == []
    ours = [(page, words) for page, words in named if words[:2] == ["python", "-m"] and words[3:]]
    assert [x for x in ours if x[1][2].startswith("medusa_exp") and x[1][3] != "--help"] == []


def test_extras_and_sessions_that_pages_name_exist():
    assert set(extras()) <= set(PROJECT["project"]["optional-dependencies"])
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = set(re.findall(r"^def (\w+)\(session", noxfile, re.MULTILINE))
    named = set(re.findall(r"nox -s (\w+)", "".join(p.read_text("utf-8") for p in PAGES)))
    assert named <= sessions and len(named) > 8
    testing = (ROOT / "docs/develop/testing.md").read_text(encoding="utf-8")
    listed = sessions - {"check_contents", "check_runs"}  # helpers of sessions
    assert [name for name in sorted(listed) if f"`{name}`" not in testing] == []


def _code(page: str) -> list[str]:
    """Return the pieces of inline code; those of a folder's path count for the folder too."""
    found = re.findall(r"`[^`\n]+`", page)
    return [*found, *(f"{piece.partition('/')[0]}/`" for piece in found if "/" in piece)]


def _keys(section: object, prefix: str = ""):
    for field in fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _keys(value, f"{prefix}{field.name}.")
        yield f"{prefix}{field.name}"
