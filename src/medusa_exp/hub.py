"""Publish a run's heads on the Hugging Face hub.

    python -m medusa_exp.hub push RUN_DIR OWNER/NAME [--private]

Uploads heads, tokenizer, draft tree and model card; nothing else of the run, and no file that holds
a path of this machine or a secret of its environment.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from medusa_exp.errors import UserError, as_program
from medusa_exp.runs.files import MOST_BYTES, read_json, remove

_WEIGHTS = ("config.json", "model.safetensors")
_TEXTS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
_CARD, _TREE = "README.md", "tree.json"
_PLACES = ("backbone", "name_or_path", "_name_or_path")
"""Keys of JSON files that hold where something lies."""
_SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|PRIVATE_KEY|ACCESS_KEY", re.IGNORECASE
)
_SHORTEST_SECRET = 8


def push(run: Path, name: str, *, private: bool = False) -> str:
    """Upload what belongs to a run's heads; return where it is.

    Args:
        run: run directory.
        name: of the repository, OWNER/NAME; it is made where there is none.
        private: make it a private one.

    Raises:
        UserError: there are no heads, no token, something that must not be published, or the hub
            refuses.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        raise UserError(f"{name} is no name of a repository: give OWNER/NAME.")
    if missing := [file for file in _WEIGHTS if not (run / "heads" / file).is_file()]:
        raise UserError(f"{run}/heads has no {' and no '.join(missing)}: name a run with heads.")
    token = get_token()
    if token is None:
        raise UserError("no token of the Hugging Face hub: run `hf auth login`, or set HF_TOKEN.")
    with TemporaryDirectory(prefix="medusa-exp-hub-") as folder:
        stage(run, Path(folder))
        check_contents(Path(folder), run, {"HF_TOKEN": token, **os.environ})
        api = HfApi(token=token)
        try:
            place = api.create_repo(name, private=private or None, exist_ok=True)
            message = "Upload heads, tree and card by medusa_exp"
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        except _hub_errors() as error:
            said = " ".join(str(error).split()).replace(token, "...")[:300]
            raise UserError(f"the hub did not take {name}: {said}") from error
    return str(place)


def _hub_errors() -> tuple[type[Exception], ...]:
    """Return what the hub raises: beneath it are httpx, or, from huggingface-hub 2 on, httpx2."""
    loaded = [sys.modules.get(name) for name in ("httpx", "httpx2")]
    of_network = [module.HTTPError for module in loaded if module is not None]
    return (*of_network, HfHubHTTPError, OSError, ValueError)


def stage(run: Path, folder: Path) -> None:
    """Put what is to be published into an empty folder.

    Raises:
        UserError: a file is not what it should be.
    """
    heads = run / "heads"
    for name in _WEIGHTS + _TEXTS:
        if (heads / name).is_file():
            _copy(heads / name, folder / name)
    if (heads / "chat_templates").is_dir():
        shutil.copytree(heads / "chat_templates", folder / "chat_templates")
    if (run / _TREE).is_file():
        _copy(run / _TREE, folder / _TREE)
    _copy(card_of(run), folder / _CARD)
    for path in folder.glob("*.json"):
        _leave_out_places(path)


def _copy(path: Path, target: Path) -> None:
    if path.suffix != ".safetensors" and path.stat().st_size > MOST_BYTES:
        raise UserError(
            f"{path} is larger than {MOST_BYTES >> 20} MiB: no run has written it. Restore it."
        )
    shutil.copyfile(path, target)


def card_of(run: Path) -> Path:
    """Return the card of a run's heads; runs of earlier versions get theirs now."""
    path = run / "heads" / _CARD
    if not path.is_file():
        from medusa_exp.stages.heads_card import write_card
        from medusa_exp.stages.session import Session

        write_card(Session.of_run(run).config, run)
    return path


def _leave_out_places(path: Path) -> None:
    """Keep of a local directory its name; names on the hub stay."""
    config: Any = read_json(path)
    if not isinstance(config, dict):
        return
    for key in _PLACES:
        place = config.get(key)
        if isinstance(place, str) and (place.count("/") != 1 or Path(place).exists()):
            config[key] = Path(place).name
    remove(path)
    try:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{path.name} holds text that is none of Unicode ({error}).") from error


def check_contents(folder: Path, run: Path, environment: dict[str, str]) -> None:
    """Raise a UserError where a text to be published names a place here, or holds a secret.

    Args:
        folder: what is to be published.
        run: run directory.
        environment: variables; those whose names speak of tokens, keys or passwords are secrets.
    """
    words = dict(_private_words(run, environment))
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix == ".safetensors":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for word, what in words.items():
            if word in text:
                raise UserError(
                    f"{path.relative_to(folder)} would publish {what}: nothing was uploaded. Take "
                    f"it out of {run / 'heads'}."
                )


def _private_words(run: Path, environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    for place in (Path.home(), run.resolve(), Path.cwd()):
        if len(place.parts) > 1:  # the root says nothing of anybody
            # /app and /root are tokens of some vocabularies: only with what lies in them a path.
            yield f"{place}/" if len(place.parts) == 2 else str(place), "a path of this machine"
    for name, value in environment.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET:
            yield value, f"the value of the environment variable {name}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m medusa_exp.hub", description="Publish heads.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "upload heads, tokenizer, tree and card of a run"
    one = commands.add_parser("push", help=about, description=about)
    one.add_argument("run", type=Path, metavar="RUN_DIR")
    one.add_argument("name", metavar="OWNER/NAME")
    one.add_argument("--private", action="store_true", help="make it a private repository")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run as a program."""
    options = _parser().parse_args(arguments)
    with as_program():
        print(push(options.run, options.name, private=options.private))


if __name__ == "__main__":
    main(sys.argv[1:])
