"""Is rendering a chat template over in time? Tried in a process of its own, that can be stopped.

A template is a program, which the sandbox keeps from files and code, and not from loops without end
or texts of gigabytes. No signal gets through to one that is computing `10 ** 10 ** 10`.
"""

import contextlib
import os
import select
import signal
import time
from functools import cache
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

SECONDS = 8.0
_SECONDS_OF_PROCESSOR = 5
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
    if not hasattr(os, "fork"):
        return None
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _try(template, writer)
    os.close(writer)
    try:
        return _answer(reader)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _answer(reader: int) -> str | None:
    end, said = time.monotonic() + SECONDS, b""
    while (left := end - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            part = os.read(reader, 1000)
            if not part:  # it is through, or was killed for its memory
                return _in_words(said)
            said += part
    return f"rendering a chat of five messages is not over after {SECONDS:.0f} seconds"


def _in_words(said: bytes) -> str | None:
    if said == b"fine":
        return None
    return said.decode() or "the process that rendered a chat of five messages died"


def _try(template: str, writer: int) -> None:
    """Render in the child, and end it without anything that an exit would do in the parent."""
    said = "fine"
    try:
        _limit_memory()
        texts = [text for chat in _CHATS for text in _rendered(template, chat)]
        if (longest := max(map(len, texts), default=0)) > _MOST_TEXT:
            said = f"it makes {longest:,} characters of a chat of five messages"
    except MemoryError:
        said = "rendering a chat of five messages takes more memory than there should be need of"
    except BaseException:
        said = "fine"  # its own words: they will be heard where it is used
    finally:
        with contextlib.suppress(BaseException):
            os.write(writer, said.encode())
        os._exit(0)


def _rendered(template: str, chat: list[dict[str, str]]) -> list[str]:
    try:
        texts: list[str] = render_jinja_template([chat], chat_template=template)[0]
        return texts
    except MemoryError:
        raise
    except Exception:
        return []


def _limit_memory() -> None:
    import resource

    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS_OF_PROCESSOR, _SECONDS_OF_PROCESSOR + 1))
