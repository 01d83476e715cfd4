"""Code blocks of README and docs, and how each is tried; see docs/develop/testing.md.

A block of `sh` or `python` has a comment of HTML on the line before it:

    <!-- run -->                    as it stands
    <!-- run: small KEY=VALUE -->   with SMALL and KEY=VALUE added to each command of medusa_exp
    <!-- not run: REASON -->
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "kernels/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRIED = ("sh", "python")
SMALL = (
    "device=cpu",
    "dtype=fp32",
    "logger=none",
    "head.num_heads=2",
    "dataset.max_length=100",
    "dataset.val_fraction=0.2",
    "dataset.test_fraction=0.2",
    "dataset.num_workers=1",
    "train.max_steps=4",
    "train.batch_tokens=300",
    "train.val_prompts=2",
    "train.val_every=4",
    "train.val_batches=1",
    "train.loss_chunk_rows=64",
    "decode.max_new_tokens=12",
    "tree.num_prompts=2",
    "tree.max_nodes=4",
    "tree.batch_sizes=[1]",
    "evaluate.num_prompts=2",
    "evaluate.baselines=[chain]",
    "evaluate.warmup_prompts=0",
)
"""Settings with which a run on forty short chats takes seconds."""
SMALL_DATA = (
    "dataset.num_conversations=120",
    "regenerate.num_documents=6",
    "regenerate.num_val_documents=2",
    "regenerate.max_new_tokens=12",
)
"""The same for made-up chats."""
SMALL_MODEL = (
    "tokenizer.vocab_size=384",
    "model.pretrain.hidden_size=32",
    "model.pretrain.intermediate_size=48",
    "model.pretrain.num_hidden_layers=2",
    "model.pretrain.max_steps=4",
)
"""The same for a model that is made from them."""

_FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- (not run|run)(?:: (.+?))? -->\s*$")
_PROGRAM = re.compile(r"python -m medusa_exp(?= |$)")
_INSTALLATION = re.compile(r"(python3 -m venv \S+|(\.venv/bin/)?pip install [^&\n]+?)( && |$)")
_SPAN = re.compile(r"`([^`\n]+)`")
_OVERRIDE = re.compile(r"\+?[a-z_]+(\.[a-z_]+)*=\S")
_EXTRAS = re.compile(r"(?:medusa-exp|'\.|\s\.)\[([a-z,]+)\]")


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: str
    line: int
    """Of its fence, from 1."""
    language: str
    code: str
    mark: str | None
    """`run`, `not run`, or None: it has no mark."""
    words: str
    """What the mark says behind its colon."""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    """Return all blocks that are tried or say why not."""
    return [block for page in PAGES for block in blocks_of(page)]


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page that hold commands or Python."""
    text, found = page.read_text(encoding="utf-8"), []
    for fence in _FENCE.finditer(text):
        if fence[2] not in TRIED:
            continue
        code = re.sub(rf"^{fence[1]}", "", fence[3], flags=re.MULTILINE)
        mark = _MARK.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start()) + 1
        name = page.relative_to(ROOT).as_posix()
        of_mark = (mark[1], mark[2] or "") if mark else (None, "")
        found.append(Block(name, line, fence[2], code, *of_mark))
    return found


def script(block: Block, places: dict[str, Path]) -> str:
    """Return what bash runs for a block of commands: without installations, on small settings."""
    lines = block.code.replace("\\\n", " ").splitlines()
    commands = [_INSTALLATION.sub("", re.sub(r"\s+# .*", "", line)) for line in lines]
    small = [*SMALL] if block.words.split(" ")[0] == "small" else []
    more = shlex.split(block.words.removeprefix("small"))
    changed = [_with(command, small, more) for command in commands if command.strip()]
    return in_place("\n".join(changed).replace(".venv/bin/", ""), places)


def in_place(code: str, places: dict[str, Path]) -> str:
    """Put what was made for it in the place of each word in capitals."""
    for word, path in places.items():
        code = re.sub(rf"\b{word}\b", str(path), code)
    return code


def _with(command: str, small: list[str], more: list[str]) -> str:
    """Add settings to a command of medusa_exp; those that it has itself give way to `more`."""
    if not _PROGRAM.search(command):
        return command
    makes_its_own = "experiment=from_scratch" in command or "experiment=smoke" in command
    if small and (makes_its_own or "experiment=quickstart" in command):
        small = [*small, *SMALL_DATA, *(SMALL_MODEL if makes_its_own else ())]
    own = {word.partition("=")[0] for word in shlex.split(command) if "=" in word}
    added = [word for word in small if word.partition("=")[0] not in own] + more
    if "logger" in {key.partition(".")[0] for key in own}:
        added = [word for word in added if word != "logger=none"]
    for key in {word.partition("=")[0] for word in more} & own:
        command = re.sub(rf"(^| )(['\"]?){re.escape(key)}=\S*", " ", command)
    return f"{command} {shlex.join(added)}" if added else command


def extras() -> dict[str, str]:
    """Return the extras of this package that pages name, each with the page."""
    return {
        extra: page.name
        for page in PAGES
        for names in _EXTRAS.findall(page.read_text(encoding="utf-8"))
        for extra in names.split(",")
    }


def spans() -> list[tuple[str, str]]:
    """Return page and text of every piece of inline code."""
    found = []
    for page in PAGES:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
        found += [(page.relative_to(ROOT).as_posix(), span) for span in _SPAN.findall(text)]
    return found


def overrides() -> list[tuple[str, list[str]]]:
    """Return page and words of every piece of inline code that is one override or several."""
    found = []
    for page, span in spans():
        try:
            words = shlex.split(span)
        except ValueError:
            continue
        if words and all(_OVERRIDE.match(word) for word in words):
            found.append((page, words))
    return found
