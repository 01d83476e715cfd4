"""Write docs/results.md, and the table of README.md, from benchmarks/results/*.json.

`python scripts/results_page.py`; tests/test_docs.py says when they are out of date. A file has

- `title` and `about` (by default those of TITLES), `command`, `machine` (with commit and time), and
- `rows`, which benchmarks write (`benchmarks/measuring.py`): a figure, its reference, its bar; or
- `columns` and `table`, any table; or `runs`, whole runs; or what benchmarks/gpu/run.py writes;
- `negative`: what did not work, as one or more sentences.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
BEGIN = "<!-- results: written by scripts/results_page.py -->"
END = "<!-- end of results -->"

Found = dict[str, Any]

TITLES = {
    "attention": (
        "Attention over grouped queries",
        "Processor time of a decoding step with our attention; the reference is sdpa.",
    ),
    "data": (
        "Reading, masking, packing chats",
        "68,000 made-up records; the reference is the usual way to do the same.",
    ),
    "decode": ("Tree decoding", "A run from_scratch, and ten architectures of random weights."),
    "sweep": ("Sweeps", "Twelve settings of heads (from_scratch); the reference is one by one."),
    "train": (
        "Training",
        "Heads of a made-up model; the reference is a plain loop that pads and keeps all logits.",
    ),
    "wandb": ("What W&B costs a training step", "The reference is the same without W&B."),
}
"""First word of a file's name -> title and what is compared, where the file does not say."""

ORDER = ("runs", "decode", "gpu", "verification", "train", "data")
"""First words of the files that come first."""

TOP = """\
# Results

Figures of the project, each with its command, machine, date and commit ("not kept" where one was
not). This page is written by `python scripts/results_page.py` from the files in
`benchmarks/results/`, and so is the table in the README. A figure elsewhere that is in none of
these files stands on its page with its command.

- A commit with `+` had uncommitted changes. Hashes are those of this repository.
- `+experiment=quickstart`, and *the quickstart*, of commits before d6aab59 are what
  `+experiment=from_scratch` is today: it made its model first.
- Recurrent heads of commits before 6c6fa05 have one projection for all; today's have one each up to
  16,384 tokens of their vocabulary (`head.own_projections=false` is what they were).
- A *speed-up* is over plain decoding of the same prompts, in the same process, in turn; its
  interval is a bootstrap over prompts ([how](guide/evaluation.md)). It belongs to a model, a text
  and a machine in its state on that day.
- *Bar*: what was asked for before measuring, unless the section says otherwise. What misses its
  bar stays on the page.
"""


def page() -> str:
    """Return docs/results.md."""
    found = {path.stem: _read(path) for path in sorted(RESULTS.glob("*.json"), key=_place)}
    parts = [TOP, _negative(found)]
    parts += [_section(name, file) for name, file in found.items()]
    return "\n".join(parts)


def readme_table() -> str:
    """Return the table of README.md: the whole runs that say `in_readme`."""
    runs = [run for run in _read(RESULTS / "runs.json")["runs"] if run["in_readme"]]
    columns = ("model", "device", "tokens per step", "speed-up (95 % interval)", "identical")
    return _table(columns, ([*_run(run)[:2], *_run(run)[4:7]] for run in runs))


def with_table(readme: str) -> str:
    """Return a README with the table in its place."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has no lines {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{readme_table()}{END}{after}"


def _section(name: str, found: Found) -> str:
    title, about = _titles(name, found)
    lines = [f"## {title}\n"]
    if about:
        lines.append(f"{about}\n")
    if "runs" not in found:
        lines.append(f"{_origin(found)}\n")
    lines.append(_body(found))
    if negative := found.get("negative"):
        lines.append(f"**What did not work:** {negative}\n")
    lines.append(f"Source: [`{name}.json`](../benchmarks/results/{name}.json).\n")
    return "\n".join(lines)


def _body(found: Found) -> str:
    """Return the table of a file, whichever of its forms it has."""
    columns: tuple[str, ...]
    if "runs" in found:
        columns = ("model", "device", "heads", "nodes", "tokens per step")
        columns += ("speed-up (95 % interval)", "identical", "command", "commit, date", "notes")
        return _table(columns, (_run(run) for run in found["runs"]))
    if "columns" in found:
        return _table(found["columns"], found["table"])
    if "rows" in found:
        columns = ("what", "found", "reference", "ratio", "bar", "details")
        return _table(columns, (_row(row) for row in found["rows"]))
    columns = ("what", "unit", "at 9ce118e", "now", "bar", "")
    keys = ("what", "unit", "before", "now", "bar")
    return _table(columns, ([*(row[key] for key in keys), _verdict(row)] for row in found["table"]))


def _row(row: Found) -> list[Any]:
    bar = f"{row['bar']}{': ' if row['bar'] and _verdict(row) else ''}{_verdict(row)}"
    details = "; ".join(f"{name} {_plain(value)}" for name, value in row["details"].items())
    figures = [_with_unit(row[key], row["unit"]) for key in ("ours", "reference")]
    ratio = "" if row["ratio"] is None else f"{_number(row['ratio'])}x"
    return [row["what"], *figures, ratio, bar, details]


def _run(run: Found) -> list[Any]:
    speedup = f"{run['speedup']:.2f}x"
    if run["speedup_low"] is not None:
        speedup += f" ({run['speedup_low']:.2f} to {run['speedup_high']:.2f})"
    total, same = run["num_prompts"], run["num_identical"]
    identical = "not kept" if total is None else f"{same} of {total}"
    command = f"`{run['command']}`" if run["command"] else "not kept"
    told = [run["model"], run["device"], run["heads"], run["num_nodes"]]
    told += [f"{run['tokens_per_step']:.2f}", speedup, identical, command]
    return [*told, f"{run['commit']}, {run['date']}", run.get("note")]


def _negative(found: dict[str, Found]) -> str:
    """Return what did not work, and which bars were missed, each with a link to its section."""
    lines = ["## What did not work\n"]
    for name, file in found.items():
        title, _ = _titles(name, file)
        link = f"[{title}](#{_anchor(title)})"
        if negative := file.get("negative"):
            lines.append(f"- {link}: {negative}")
        rows = file.get("rows") or (file.get("table", []) if "columns" not in file else [])
        missed = [f"{row['what']} ({row['bar']})" for row in rows if row["is_cleared"] is False]
        if missed:
            lines.append(f"- {link}, bars that were missed: {'; '.join(missed)}.")
        slower = [run for run in file.get("runs", ()) if run["speedup"] < 1]
        for run in slower:
            lines.append(f"- {link}: {run['model']}, {run['speedup']:.2f}x: {run['note']}.")
    return "\n".join(lines) + "\n"


def _origin(found: Found) -> str:
    """Return command, machine, commit and date in a line or two."""
    machine = {**found["machine"]}
    command = found.get("command", machine.pop("command", ""))
    words = command if isinstance(command, str) else f"python {shlex.join(command)}"
    told = machine.get("gpu") or f"{machine['cores']} cores of an {machine['cpu']}"
    if threads := machine.get("OMP_NUM_THREADS"):
        told += f", {threads} thread{'s' * (threads != '1')}"
    if machine.get("load"):
        told += f", load {machine['load'][0]:g}"
    versions = machine.get("versions", {})
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "cupy") if name in versions
    )
    note = f"; {machine['note']}" if machine.get("note") else ""
    commit = machine["commit"] or "not kept"
    date = str(machine["time"])[:10]
    return f"`{words}`\n\n{told}; {packages}; commit {commit}, {date}{note}."


def _titles(name: str, found: Found) -> tuple[str, str]:
    title, about = TITLES.get(name.partition("-")[0], (name, ""))
    if name.startswith("gpu-") and "title" not in found:
        title = f"On a GPU: {found.get('machine', {}).get('gpu', name)}"
    return found.get("title", title), found.get("about", about)


def _table(columns: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table of Markdown; a column of numbers is not told apart."""
    heads = list(columns)
    lines = [heads, ["---"] * len(heads), *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = _number(value) if isinstance(value, int | float) else str(value)
    return text.replace("|", "\\|")


def _with_unit(value: float | None, unit: str) -> str:
    return "" if value is None else f"{_number(value)}{' ' if unit not in ('x', '') else ''}{unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _verdict(row: Found) -> str:
    return {True: "passed", False: "**missed**", None: ""}[row["is_cleared"]]


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return "-".join(kept.split())


def _place(path: Path) -> tuple[int, str]:
    first = path.stem.partition("-")[0]
    return (ORDER.index(first) if first in ORDER else len(ORDER), path.stem)


def _read(path: Path) -> Found:
    found: Found = json.loads(path.read_text(encoding="utf-8"))
    return found


def _lines() -> Iterator[tuple[Path, str]]:
    yield PAGE, page()
    yield README, with_table(README.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for target, text in _lines():
        target.write_text(text, encoding="utf-8")
        print(target)
