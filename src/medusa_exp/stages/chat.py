"""Stage chat: talk to the model in the terminal, and see what each decoding step accepts.

At a terminal every line is a turn; an empty one ends the chat, /new begins another. Text that is
piped in is one prompt, with one response.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from medusa_exp.config import Config
from medusa_exp.data import Message
from medusa_exp.data.template import ChatTemplate
from medusa_exp.decode.decoder import Decoder, StreamedStep
from medusa_exp.errors import UserError
from medusa_exp.stages.session import Session

STYLES = ("bold cyan", "bold magenta")
"""Styles of the tokens that one step committed, in turn; a single token is plain."""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Chat until the input ends; return tokens per step over all responses."""
    session = session or Session(config, out)
    chat = Chat(session.decoder())
    if sys.stdin is not None and sys.stdin.isatty():
        _talk(chat, Console())
    else:
        _respond_to_piped(chat, _piped())
    return {"chat/tokens_per_step": chat.tokens_per_step} if chat.num_steps else {}


@dataclass
class Chat:
    """A conversation with a model, and what its responses have cost so far."""

    decoder: Decoder
    messages: list[Message] = field(default_factory=list)
    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Mean over all responses; the step of a prompt counts."""
        return self.num_tokens / max(1, self.num_steps)

    def respond(self, text: str) -> Iterator[StreamedStep]:
        """Take a turn of the user's; yield what each step adds to the response.

        Raises:
            UserError: the conversation has grown too long for the model.
        """
        tokenizer = self.decoder.tokenizer
        assert tokenizer is not None
        messages = [*self.messages, Message("user", text)]
        prompt = ChatTemplate(tokenizer).prompt(messages)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        response, num_tokens, num_steps = "", 0, 0
        start = time.perf_counter()
        for step in self.decoder.stream(ids):
            response += step.text
            num_tokens += step.num_tokens
            num_steps += 1
            yield step
        self.seconds += time.perf_counter() - start
        self.num_tokens += num_tokens
        self.num_steps += num_steps
        self.messages = [*messages, Message("assistant", response)]


def _talk(chat: Chat, console: Console) -> None:
    console.print("An empty line ends the chat, /new begins another.", style="dim")
    while line := _read(console):
        if line == "/new":
            chat.messages = []
            continue
        try:
            _print_response(chat, line, console)
        except UserError as error:
            console.print(f"{error} /new begins another chat.", style="red")
            continue
        console.print(_figures(chat), style="dim")


def _print_response(chat: Chat, line: str, console: Console) -> None:
    for number, step in enumerate(chat.respond(line)):
        style = STYLES[number % len(STYLES)] if step.num_tokens > 1 else ""
        console.print(Text(step.text, style=style), end="", soft_wrap=True)
    console.print()


def _piped() -> str:
    if sys.stdin is None:  # closed by who started us
        return ""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt piped into stage chat is not UTF-8 text: {error}.") from error


def _respond_to_piped(chat: Chat, prompt: str) -> None:
    if not prompt.strip():
        raise UserError("stage chat has read nothing: pipe a prompt into it, or run it alone.")
    console = Console()
    _print_response(chat, prompt.strip(), console)
    console.print(_figures(chat), style="dim")


def _read(console: Console) -> str:
    try:
        return console.input("[bold]you> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _figures(chat: Chat) -> str:
    rate = chat.num_tokens / max(chat.seconds, 1e-9)
    return f"{chat.tokens_per_step:.2f} tokens per backbone step, {rate:.0f} tokens a second so far"
