"""Stage demo: watch held-out prompts being answered, plainly and over the draft tree, side by side.

At a terminal both answers grow at once: the next step is always that of the method whose own clock
is behind, so at each moment both have had the same time. Draft tokens that were accepted are
colored; what the backbone said itself is plain. Elsewhere each answer is printed once, as text.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from medusa_exp import demo
from medusa_exp.config import Config
from medusa_exp.data.prompts import Prompt
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.detokenizer import IncrementalDetokenizer
from medusa_exp.decode.loop import Responses
from medusa_exp.runs.machine import synchronize
from medusa_exp.stages.chat import STYLES
from medusa_exp.stages.session import Session

_MOST, _OUT_OF = 4, 40
"""Prompts that are shown, of different categories, and held-out ones that they are chosen from."""
_LONGEST = 240
"""Characters of a prompt that are shown."""
_PLAIN, _HEADS = "plain decoding", "with Medusa heads"
Steps = Iterator[list[list[int]]]


@dataclass
class Racer:
    """One way of decoding on its way through an answer."""

    name: str
    steps: Steps
    detokenizer: IncrementalDetokenizer
    device: torch.device
    tokens: list[int] = field(default_factory=list)
    text: Text = field(default_factory=Text)
    num_steps: int = 0
    seconds: float = 0.0
    """Of its own steps alone: what is shown meanwhile is not counted."""
    is_done: bool = False

    def advance(self) -> None:
        """Take a step."""
        start = time.perf_counter()
        added = next(self.steps, None)
        synchronize(self.device)  # a device is at work on the next step by now, which counts here
        self.seconds += time.perf_counter() - start
        if added is None:
            self.is_done = True
            return
        # The first step is the prompt's; the last token of each is the backbone's own.
        drafts, own = added[0][:-1], added[0][-1:]
        self._show(drafts, STYLES[self.num_steps % len(STYLES)])
        self._show(own, "")
        self.num_steps += 1

    def _show(self, tokens: list[int], style: str) -> None:
        self.tokens += tokens
        self.text.append(self.detokenizer.add(tokens), style)

    @property
    def figures(self) -> str:
        """How far it is."""
        rate = len(self.tokens) / max(self.seconds, 1e-9)
        return f"{len(self.tokens)} tokens, {self.num_steps} steps, {rate:.0f} tokens/s"


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Answer a few prompts for somebody to look at; it adds no number."""
    demo.check_used(config.model.path)
    session = session or Session(config, out)
    decoder, console = session.decoder(), Console()
    assert decoder.tokenizer is not None
    prompts = session.prompts("test", decoder.backbone, decoder.tokenizer, _OUT_OF)
    shown = of_each_category(prompts)[:_MOST]
    _warm_up(decoder, shown[0])
    for prompt in shown:
        _print_prompt(prompt, decoder.tokenizer, console)
        plain, heads = racers(decoder, prompt.input_ids)
        race(plain, heads, console)
        said = verdict(plain, heads, config.decode.rule)
        console.print(said, "", sep="\n", soft_wrap=not console.is_terminal)
    return {}


def of_each_category(prompts: list[Prompt]) -> list[Prompt]:
    """Return the shortest prompt of each category."""
    found: dict[str, Prompt] = {}
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.input_ids)):
        found.setdefault(prompt.category, prompt)
    return list(found.values())


def racers(decoder: Decoder, ids: list[int]) -> tuple[Racer, Racer]:
    """Return plain decoding and decoding over the tree at the start of a prompt."""
    tokenizer, device = decoder.tokenizer, decoder.backbone.device
    assert tokenizer is not None
    plain, heads = (Responses(1, decoder.limits) for _ in range(2))
    return (
        Racer(_PLAIN, decoder.plain_steps([ids], plain), IncrementalDetokenizer(tokenizer), device),
        Racer(_HEADS, decoder.steps([ids], heads), IncrementalDetokenizer(tokenizer), device),
    )


def race(plain: Racer, heads: Racer, console: Console) -> None:
    """Let both answer to the end, and show it."""
    if not console.is_terminal:
        for _ in _steps_of(plain, heads):
            pass
        console.print(heads.text.plain, soft_wrap=True, markup=False, highlight=False)
        return
    with Live(console=console, auto_refresh=False) as live:
        for _ in _steps_of(plain, heads):
            live.update(_beside(plain, heads), refresh=True)


def _steps_of(*all_of_them: Racer) -> Iterator[None]:
    while waiting := [racer for racer in all_of_them if not racer.is_done]:
        min(waiting, key=lambda racer: racer.seconds).advance()
        yield


def _beside(*all_of_them: Racer) -> RenderableType:
    table = Table.grid(expand=True)
    for _ in all_of_them:
        table.add_column(ratio=1)
    panels = (
        Panel(Group(racer.text, Text(racer.figures, "dim")), title=racer.name, title_align="left")
        for racer in all_of_them
    )
    table.add_row(*panels)
    return table


def verdict(plain: Racer, heads: Racer, rule: str) -> str:
    """Say in a line what the heads have brought."""
    faster = (plain.seconds / len(plain.tokens)) / (heads.seconds / len(heads.tokens))
    line = (
        f"{len(heads.tokens) / heads.num_steps:.1f} tokens a step, {faster:.1f} times as fast "
        f"({heads.num_steps} steps in {heads.seconds:.2f} s; plain decoding: {plain.num_steps} in "
        f"{plain.seconds:.2f} s)"
    )
    if rule == "sampling":  # both are draws
        return line
    return f"{line}, {'the same' if plain.tokens == heads.tokens else 'NOT the same'} tokens"


def _warm_up(decoder: Decoder, prompt: Prompt) -> None:
    """Answer a little: what is done once in a process is no part of a step."""
    limits = replace(decoder.limits, max_new_tokens=4)
    for steps in (decoder.plain_steps, decoder.steps):
        for _ in steps([prompt.input_ids], Responses(1, limits)):
            pass


def _print_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    text = tokenizer.decode(prompt.input_ids, skip_special_tokens=True).strip()
    text = text if len(text) <= _LONGEST else f"[...] {text[-_LONGEST:]}"
    console.print(Text(f"> {text}", "bold"), soft_wrap=not console.is_terminal)
