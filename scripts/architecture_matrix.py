#!/usr/bin/env python3
"""Write docs/reference/architectures.md from what `nox -s architectures` has found.

    MATRIX=found pytest -m slow tests/slow/test_architectures.py
    python scripts/architecture_matrix.py found

`nox -s architectures` does both.
"""

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "architectures.md"
HEAD = """\
# Architectures

Written by `nox -s architectures` from what ran: tiny random models of each architecture, in float32
on a CPU, with transformers {version}. Greedy answers to four prompts of unequal length are those of
`model.generate`, token for token, with fresh heads and with guesses that are often right. A model
that is not in the list is checked when it is loaded, in the same ways, before anything long. Of a
model for pictures and text (Gemma 3, Mistral 3, Qwen-VL) the text path is decoded.

- **drafts**: trees; chains alone, where layers keep a recurrent state; or refused, with the reason.
- **attention** of decoding, by default: `sdpa`; *grouped*, the same without copies of the cache for
  each query head; `eager`, where the architecture has no other; none.
- **packing**: may `train.batching=packed` put several documents into a row? Else it is refused.
- **bfloat16**: answers in this type are those of plain decoding, or differ where two tokens are as
  good as equally likely, and nowhere else (*near ties*; four prompts).
- **prefix**: may heads have `head.prefix_attention`? Else it is refused.
- **logits**: is anything done to what the `lm_head` gives (scaled, capped)? The model's own code
  does it then, for heads too.

| architecture | drafts | attention | packing | bfloat16 | prefix | logits | notes |
|---|---|---|---|---|---|---|---|
"""


def row(name: str, found: dict[str, Any]) -> str:
    """Return an architecture's row; one that this transformers lacks says so."""
    if not found:
        return f"| {name} | not tried | | | | | | not in this version of transformers |"
    words = {True: "yes", False: "no", None: ""}
    packing, prefix = (words[found.get(key)] for key in ("packing", "prefix_attention"))
    logits = {True: "scaled or capped", False: "plain", None: ""}[found.get("has_own_logits")]
    notes = found.get("notes", "").replace("|", "\\|")
    drafts, kernel = found.get("drafts", "FAILED"), found.get("attention", "")
    cells = (name, drafts, kernel, packing, found.get("bfloat16", ""), prefix, logits)
    return f"| {' | '.join(cells)} | {notes} |"


def page(parts: list[dict[str, Any]]) -> str:
    """Return the page, from what each of the processes has found."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, one in part["architectures"].items():
            found[name] = {**found.get(name, {}), **one}
    rows = [row(name, one) for name, one in sorted(found.items())]
    return HEAD.format(version=parts[0]["transformers"]) + "\n".join(rows) + "\n"


if __name__ == "__main__":
    files = sorted(Path(sys.argv[1]).glob("*.json"))
    if not files:
        sys.exit(
            f"{sys.argv[1]} holds nothing that was found: run the tests with MATRIX={sys.argv[1]}"
        )
    PAGE.write_text(page([json.loads(file.read_text("utf-8")) for file in files]), encoding="utf-8")
