"""The words of a command: which are overrides, which options of Hydra's, and how both are read."""

import argparse
import re
from argparse import ArgumentError
from collections.abc import Iterable

from hydra._internal.utils import get_args_parser  # private: hydra 1.3
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from medusa_exp.errors import UserError

GROUPS_ALONE = ("experiment", "sweep")
"""Groups that are no keys."""
_LONGEST_WORD = 1 << 16
"""Of a command line; Hydra's parser takes a second for ten thousand characters."""


def _accept_lazy_help() -> None:
    """Let argparse take a help that is no string until it is printed, as Hydra 1.3 has one.

    From Python 3.14 on it reads each help as soon as it is given, and Hydra ended there.
    """
    check = getattr(argparse._ActionsContainer, "_check_help", None)  # private: Python 3.14
    if check is None:
        return

    def check_strings(self: argparse._ActionsContainer, action: argparse.Action) -> None:
        if isinstance(action.help, str):
            check(self, action)

    argparse._ActionsContainer._check_help = check_strings  # type: ignore[attr-defined]


_accept_lazy_help()


def check_words(argv: list[str]) -> None:
    """Refuse words that are too long to be read, and options that Hydra has not.

    Raises:
        UserError: there is one; says how a key is written, where it has the form of an option.
    """
    for word in argv:
        if len(word) > _LONGEST_WORD:
            raise UserError(
                f"{word[:60]}... has {len(word):,} characters: an argument has "
                f"{_LONGEST_WORD:,} at most. Put what is longer into a file, such as tree.path."
            )
    _refuse_unknown_flags(argv)


def overrides_in(argv: list[str]) -> list[str]:
    """Return the overrides among arguments: what is neither a flag of Hydra's nor its value."""
    return _split(argv)[0]


def key_of(override: str) -> str:
    """Return the key or group that an override names: `head` of `+head@x=medusa`.

    Raises:
        UserError: Hydra cannot read it.
    """
    return str(parsed(override).key_or_group).lstrip("/")


def swept_keys(overrides: Iterable[str]) -> set[str]:
    """Return the keys that overrides of a sweep give several values."""
    return {key_of(one) for one in overrides if parsed(one).is_sweep_override()}


def parsed(override: str) -> Override:
    """Return an override as Hydra reads it.

    Raises:
        UserError: Hydra cannot read it.
    """
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(
            f"{override} is no override that Hydra can read: {error}{_in_quotes(override)}"
        ) from error


def split_override(override: str) -> tuple[str, str]:
    """Return key and value of an override, without signs: `+a.b=1` gives `("a.b", "1")`."""
    try:
        found = parsed(override)
    except UserError:  # Hydra took it once: shown as it is
        key, _, value = override.partition("=")
        return key.lstrip("+"), value
    return str(found.key_or_group), str(found.value())


def _refuse_unknown_flags(argv: list[str]) -> None:
    try:
        unknown = _split(argv)[1]
    except ArgumentError as error:  # of an option that Hydra has: its value is missing or wrong
        raise UserError(f"{error}.") from error
    if not unknown:
        return
    word, _, value = unknown[0].partition("=")
    key = word.lstrip("-").replace("-", "_")
    following = argv[argv.index(unknown[0]) + 1 :]
    if not value:  # it may be a word of its own
        value = next((w for w in following[:1] if not w.startswith("-") and "=" not in w), "VALUE")
    begun = [
        option for option in get_args_parser()._option_string_actions if option.startswith(word)
    ]
    if len(word) > 2 and begun and key not in GROUPS_ALONE:
        raise UserError(f"{unknown[0]} is no option: write {begun[0]}.")
    written = f"+{key}={value}" if key in GROUPS_ALONE else f"{key}={value}"
    if not word.startswith("--"):
        written = "KEY=VALUE"
    raise UserError(
        f"{unknown[0]} is no option: a key stands without dashes before it. Write {written}; "
        "`python -m medusa_exp --help` lists all keys, and --hydra-help the options."
    )


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the overrides among arguments, and the options that Hydra has not.

    Raises:
        ArgumentError: an option lacks its value, or has another than it may.
    """
    parser = get_args_parser()
    # --experiment is no abbreviation of --experimental-rerun, nor --multi one that we look for.
    parser.allow_abbrev, parser.exit_on_error = False, False
    found, unknown = parser.parse_known_args(argv)
    # It finds overrides in one place alone: in `seed=1 -m head.num_heads=2,3` not those after -m.
    later = [word for word in unknown if not word.startswith("-")]
    return [*found.overrides, *later], [word for word in unknown if word.startswith("-")]


def _in_quotes(override: str) -> str:
    """Return the advice to put a value in quotes, where that makes an override readable."""
    key, sign, value = override.partition("=")
    word = f"{key}='{value}'"
    if not sign or re.search(r"['\"\\$`!]", value):
        return ""
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return ""
    return f'. Put the value in quotes, within those of the shell: "{word}"'
