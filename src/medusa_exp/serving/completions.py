"""The completions API of OpenAI's servers, as vLLM and SGLang speak it: URLs, fields, statuses."""

import re
from typing import Any

import httpx2
import msgspec

from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.errors import UserError

PASSING = {408, 429, 500, 502, 503, 504}
"""HTTP statuses of an engine, or of what stands before it, that may answer another time."""
HINTS = {
    401: " (set serving.key_variable to the name of an environment variable with the key)",
    404: " (is it the URL of an OpenAI-compatible server, with or without /v1?)",
}
"""What to do about a status."""


class Model(msgspec.Struct):
    """What an engine says of a model that it serves."""

    id: str
    max_model_len: int | None = None


class Models(msgspec.Struct):
    """The answer to `GET models`."""

    data: list[Model] = []


class Choice(msgspec.Struct):
    """One response; vLLM names what ended it in `stop_reason`, SGLang in `matched_stop`."""

    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    matched_stop: int | str | None = None


class Completion(msgspec.Struct):
    """The answer to `POST completions`."""

    choices: list[Choice] = []
    prompt_token_ids: list[int] | None = None
    system_fingerprint: str | None = None


def sampling(rule: AcceptanceRule, seed: int) -> dict[str, Any]:
    """Return the fields of a request that say how tokens are chosen."""
    if rule.name == "greedy":
        return {"temperature": 0.0, "top_p": 1.0, "top_k": -1}
    return {
        "temperature": rule.temperature,
        "top_p": rule.top_p or 1.0,
        "top_k": rule.top_k or -1,
        "seed": seed,
    }


def endpoint(url: str) -> tuple[str, tuple[str, str] | None]:
    """Return the URL up to and with /v1, and the user and password that it had.

    They go apart from it: a URL is in messages and logs.

    Raises:
        UserError: it is none of a server, or has a query, in which a key may be.
    """
    try:
        parsed = httpx2.URL(url.strip())
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    extra = parsed.query or parsed.fragment
    if parsed.scheme not in ("http", "https") or not parsed.host or extra:
        # Only what cannot be of a password: what is no URL may have one anywhere before the @.
        shown = re.split("[?#]", url.rpartition("@")[2])[0]
        raise UserError(
            f"{shown!r} is no URL of a server: http://HOST:PORT is one, without a "
            "query; a key has its place in serving.key_variable."
        )
    auth = (parsed.username, parsed.password) if parsed.userinfo else None
    bare = str(parsed.copy_with(username="", password="")) if auth else str(parsed)
    return bare.rstrip("/").removesuffix("/v1") + "/v1", auth


def seconds_of(text: str | None) -> float | None:
    """Return the seconds of a Retry-After header; a date there is not worth the reading."""
    return float(text) if text and text.isdecimal() else None
