"""Is rendering a chat template over in time? Tried in a process of its own, that can be stopped.

A template is a program, which the sandbox keeps from files and code, and not from loops without end
or texts of gigabytes. No signal gets through to one that is computing `10 ** 10 ** 10`. The process
is a new interpreter, which runs this file and imports Jinja alone, as it is there in a tenth of a
second; a fork of a process with threads may wait for ever for a lock that one of them has held.
"""

import contextlib
import json
import signal
import subprocess
import sys
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

SECONDS_OF_PROCESSOR = 5
_SECONDS = 30.0
"""By the clock: other programs may have the processor, and not every system counts its seconds."""
_MOST_TEMPLATE = 1 << 18
_MOST_TEXT = 1 << 20
"""Characters that a template makes of the chats below, which have a hundred."""
_MEMORY = 1 << 29
"""Bytes that rendering these may take beyond what this process has."""
_USER, _ANSWER = ({"role": role, "content": f"A {role}."} for role in ("user", "assistant"))
_CHATS = (
    [_USER],
    [_USER, _ANSWER],
    [{"role": "system", "content": "Rules."}, _USER, _ANSWER, _USER, _ANSWER],
)


@cache
def refusal(template: str) -> str | None:
    """Return why a template is not to be rendered: too much time, memory or text. None: it may be.

    What it says of the chats that it is tried on (that it takes no system prompt) is no matter.
    """
    if len(template) > _MOST_TEMPLATE:
        return f"it has {len(template):,} characters, and a template has {_MOST_TEMPLATE:,} at most"
    # -P: the folder of this file has modules with the names of others.
    command = [sys.executable, "-P", __file__, str(SECONDS_OF_PROCESSOR)]
    text = template.encode(errors="surrogatepass")
    too_long = "rendering a chat of five messages is not over after {} seconds"
    try:
        done = subprocess.run(command, input=text, capture_output=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return too_long.format(round(_SECONDS))
    if sys.platform != "win32" and done.returncode in (-signal.SIGKILL, -signal.SIGXCPU):
        return too_long.format(SECONDS_OF_PROCESSOR)
    said = done.stdout.decode()
    if said == "fine":
        return None
    return said or "the process that rendered a chat of five messages died"


def _main(seconds: int) -> None:
    """Try the template of the standard input, and say on the standard output how that went."""
    template = sys.stdin.buffer.read().decode(errors="surrogatepass")
    said = "fine"
    try:
        texts = _rendered(template, seconds)
        if (longest := max(map(len, texts), default=0)) > _MOST_TEXT:
            said = f"it makes {longest:,} characters of a chat of five messages"
    except MemoryError:
        said = "rendering a chat of five messages takes more memory than there should be need of"
    sys.stdout.write(said)


def _rendered(template: str, seconds: int) -> list[str]:
    """Return the texts of those chats that the template does not refuse."""
    make = _environment().from_string
    _limit(seconds)
    texts = []
    for chat in _CHATS:
        try:
            texts.append(make(template).render(messages=chat, add_generation_prompt=False))
        except MemoryError:
            raise
        except Exception:  # its own words: they will be heard where it is used
            continue
    return texts


def _environment() -> Any:
    """Return a sandbox in which templates find what transformers gives them."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  as in Jinja

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = lambda value, **options: json.dumps(value, **options)
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _limit(seconds: int) -> None:
    """Have the system end this process where it takes too much, as far as it has limits."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError):  # a lower one holds already
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
