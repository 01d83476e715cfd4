"""Stage chat: talk to the model in the terminal, and see what each step accepts.

At a terminal every line is a turn; an empty one ends the chat, /new begins another. Text that is
piped in is one prompt, answered once.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.conversations import Message
from medusa_exp.data.template import ChatTemplate
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.drafting import Drafter, build_drafter
from medusa_exp.decode.loop import Limits, Responses, tree_steps
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.settings import limits_of, rule_of
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.model.heads import stack_heads
from medusa_exp.stages.session import Session
from medusa_exp.tree.calibration import choose_tree

_STYLES = ("bold cyan", "bold magenta")
"""Of runs that one step gave, in turn; a single token is plain."""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Chat until the input ends; return tokens per step over all answers."""
    session = session or Session(config, out)
    chat = load_chat(session)
    if sys.stdin is not None and sys.stdin.isatty():
        _talk(chat, Console())
    else:
        _answer_piped(chat, _piped())
    return {"chat/tokens_per_step": chat.tokens_per_step} if chat.num_steps else {}


@dataclass
class Chat:
    """A conversation with a model, and what its answers have cost so far."""

    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    drafter: Drafter
    limits: Limits
    rule: AcceptanceRule
    messages: list[Message] = field(default_factory=list)
    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Mean over all answers; the step of a prompt counts."""
        return self.num_tokens / max(1, self.num_steps)

    def answer(self, text: str) -> Iterator[tuple[str, int]]:
        """Say something; yield what each step adds to the answer: text, and how many tokens.

        Raises:
            UserError: the conversation has grown too long for the model.
        """
        messages = [*self.messages, Message("user", text)]
        prompt = ChatTemplate(self.tokenizer).prompt(messages)
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        answers = Responses(1, self.limits)
        tokens: list[int] = []
        shown = ""
        start = time.perf_counter()
        for [added] in tree_steps(self.backbone, self.drafter, [ids], answers, self.rule):
            tokens += added
            # Text depends on its neighbours: a step's is what the whole gains by it.
            whole = self.tokenizer.decode(tokens, skip_special_tokens=True)
            whole = whole.rstrip("\ufffd")  # half of a character comes with the next step
            yield whole[len(shown) :], len(added)
            shown = whole
        self.seconds += time.perf_counter() - start
        self.num_tokens += len(tokens)
        self.num_steps += len(answers.rows[0].accept_lengths)
        self.messages = [*messages, Message("assistant", shown)]


def load_chat(session: Session) -> Chat:
    """Load what a run has made: heads, tree and the settings of its config."""
    config, out = session.config, session.out
    backbone = session.backbone()
    check_tree_attention(backbone)
    tokenizer = session.tokenizer()
    heads = stack_heads(load_heads(out / "heads", backbone), backbone)
    tree = choose_tree(config, out, heads.num_heads)
    drafter = build_drafter(heads, tree, backbone.device)
    limits = limits_of(config, backbone, tokenizer)
    return Chat(backbone, tokenizer, drafter, limits, rule_of(config))


def _talk(chat: Chat, console: Console) -> None:
    console.print("An empty line ends the chat, /new begins another.", style="dim")
    while line := _read(console):
        if line == "/new":
            chat.messages = []
            continue
        try:
            _print_answer(chat, line, console)
        except UserError as error:
            console.print(f"{error} /new begins another chat.", style="red")
            continue
        console.print(_figures(chat), style="dim")


def _print_answer(chat: Chat, line: str, console: Console) -> None:
    for number, (piece, num_tokens) in enumerate(chat.answer(line)):
        style = _STYLES[number % len(_STYLES)] if num_tokens > 1 else ""
        console.print(Text(piece, style=style), end="", soft_wrap=True)
    console.print()


def _piped() -> str:
    if sys.stdin is None:  # closed by who started us
        return ""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt piped into stage chat is not UTF-8 text: {error}.") from error


def _answer_piped(chat: Chat, prompt: str) -> None:
    if not prompt.strip():
        raise UserError("stage chat has read nothing: pipe a prompt into it, or run it alone.")
    console = Console()
    _print_answer(chat, prompt.strip(), console)
    console.print(_figures(chat), style="dim")


def _read(console: Console) -> str:
    try:
        return console.input("[bold]you> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _figures(chat: Chat) -> str:
    rate = chat.num_tokens / max(chat.seconds, 1e-9)
    return f"{chat.tokens_per_step:.2f} tokens per backbone step, {rate:.0f} tokens a second so far"
