"""What stage inspect found, in the terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from medusa_exp.data.build import CUT, KEPT, LOST_ROWS

_SHOWN_CHARS = 1200
"""Of a sample's text; the rest lies in data_samples.jsonl."""
_OPEN, _CLOSE = "\u27e6", "\u27e7"
"""Around trained text where there is no colour."""


def print_all(found: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Print samples first and tables last, where the eye is."""
    console = Console()
    for sample in samples:
        _print_sample(console, sample)
    console.print(_records_table(found))
    console.print(_lengths_table(found))
    console.print(_roles_table(found))
    checks = found["checks"]
    console.print(
        f"{checks['runs from edge to edge of a reply']} of {checks['runs']} trained runs begin and "
        f"end with a reply; {checks['runs that could not be checked']} more could not be checked."
    )
    for what, example in found["examples"].items():
        console.print(f"{what}, for example: {example}", markup=False)
    for note in found["notes"]:
        console.print(note, markup=False)
    if "doctor" in found:
        console.print(_doctor_table(found["doctor"]))


def _print_sample(console: Console, sample: dict[str, Any]) -> None:
    is_plain = console.color_system is None
    text = Text()
    for run, is_trained in sample["runs"]:
        shown = f"{_OPEN}{run}{_CLOSE}" if is_trained and is_plain else run
        text.append(shown, style="bold green" if is_trained else "dim")
    if len(text) > _SHOWN_CHARS:
        text = text[:_SHOWN_CHARS].append(" ...", style="dim")
    how = f"between {_OPEN} and {_CLOSE}" if is_plain else "green"
    numbers = f"{sample['num_trained']} of {sample['num_tokens']} tokens trained ({how})"
    console.rule(f"{escape(sample['conversation_id'])}: {numbers}")
    console.print(text, soft_wrap=True)


def _records_table(found: dict[str, Any]) -> Table:
    table = Table("source", "outcome", "number", title="records")
    for name, outcomes in found["sources"].items():
        table.add_row(name, "read", str(outcomes["records"]))
        for reason, number in sorted(outcomes["dropped"].items()):
            table.add_row("", f"dropped: {reason}", str(number))
        table.add_row("", "kept", str(outcomes[KEPT]))
        table.add_row(
            "", f"documents of at most {found['max_length']} tokens", str(outcomes["documents"])
        )
        table.add_row("", CUT, str(outcomes[CUT]))
        if outcomes[LOST_ROWS]:
            table.add_row("", LOST_ROWS, str(outcomes[LOST_ROWS]))
        table.add_row("", "tokens", str(outcomes["tokens"]))
        share = outcomes["trained tokens"] / max(1, outcomes["tokens"])
        table.add_row("", "trained tokens", f"{outcomes['trained tokens']} ({share:.1%})")
    return table


def _lengths_table(found: dict[str, Any]) -> Table:
    marks = next(iter(found["lengths"].values()))
    table = Table("of a document", *marks, title="lengths")
    for name, spread in found["lengths"].items():
        table.add_row(name, *(f"{number:.0f}" for number in spread.values()))
    return table


def _roles_table(found: dict[str, Any]) -> Table:
    title = f"tokens by role, of {found['num_sampled']} conversations, before cutting"
    table = Table("source", "role", "tokens", "trained", "share", title=title)
    for source, roles in found["roles"].items():
        for role, numbers in roles.items():
            share = numbers["trained tokens"] / numbers["tokens"]
            table.add_row(
                source, role, str(numbers["tokens"]), str(numbers["trained tokens"]), f"{share:.1%}"
            )
    return table


def _doctor_table(findings: list[dict[str, Any]]) -> Table:
    table = Table("", "looked at", "found", title="doctor")
    for finding in findings:
        mark = "[green]ok" if finding["is_fine"] else "[bold red]look"
        table.add_row(mark, finding["name"], escape(finding["sentence"]))
    return table
