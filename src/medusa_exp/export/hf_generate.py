"""Export for plain transformers: a model directory whose `generate` decodes with our trees.

It stands alone: the target's own files, the heads, the tree, and `custom_generate/generate.py`,
which transformers loads in place of its `generate` where `trust_remote_code` is on. So
`transformers serve DIR --trust-remote-code` is a server of the OpenAI API with these heads.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from rich.filesize import decimal
from transformers.utils import cached_file

from medusa_exp.errors import UserError
from medusa_exp.identity import identity_of_files
from medusa_exp.model.checkpoint import WEIGHTS
from medusa_exp.model.source import is_adapters
from medusa_exp.runs.files import link_or_copy, publish
from medusa_exp.runs.schemas import SEAL
from medusa_exp.runs.seals import is_of_system

log = logging.getLogger(__name__)

GENERATE = '''"""`model.generate` with Medusa heads, in place of transformers' own."""


def generate(inputs=None, generation_config=None, *, model, **arguments):
    """Take what `model.generate` takes; heads/ and tree.json lie beside this folder."""
    try:
        from medusa_exp.serving.hf_generate import generate as with_heads
    except ImportError as error:
        raise ImportError(
            "this directory decodes with Medusa heads: pip install 'medusa-exp[serve]', or load "
            f"it without trust_remote_code to decode plainly ({error})"
        ) from error
    return with_heads(model, inputs=inputs, generation_config=generation_config, **arguments)
'''
_NOT_TAKEN = {
    *(".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"),
    *(".md", ".png", ".gitattributes"),
}
"""Weights in other formats than safetensors, and what is about the model and not of it."""
_SERVER_NEEDS = ("fastapi", "uvicorn", "openai", "pydantic", "python_multipart", "accelerate")


def write(
    heads: Path,
    tree: Path,
    target: str,
    out: Path,
    *,
    with_code: bool = False,
    add: Callable[[Path], None] = lambda place: None,
) -> None:
    """Write the directory, whole or not at all.

    Files are linked hard where the file system can, since they are never written into: the
    directory then takes no room for the weights. Elsewhere they are copied, which is said.

    Args:
        heads: directory of heads, as `save_heads` writes it, perhaps with a tokenizer.
        tree: file of the tree; without it the heads' guesses form a chain.
        target: the backbone's directory, or its hub name where it is in the cache.
        out: the directory to make; an old one there is replaced.
        with_code: take the target's own Python files too, which it is loaded by
            (`model.trust_remote_code`).
        add: writes more into the directory that is about to be published.

    Raises:
        UserError: there is no such model here, it is adapters without their model, or not the
            model that the heads were trained for.
    """
    source = _directory(target)
    config = json.loads((heads / "config.json").read_text("utf-8"))
    whose = f"the heads in {heads} were trained for {config['backbone']}"
    check_files(target, config["backbone_identity"], whose)
    with publish(out) as partial:
        partial.mkdir(parents=True, exist_ok=True)
        copied = sum(_place(file, partial / file.name) for file in _files(source, with_code))
        (partial / "heads").mkdir()
        for file in sorted(heads.iterdir()):
            if file.name in ("config.json", WEIGHTS):
                copied += _place(file, partial / "heads" / file.name)
            elif file.is_file() and file.name != SEAL and not is_of_system(file):
                # The tokenizer of the run, with its own template or tokens.
                (partial / file.name).unlink(missing_ok=True)
                copied += _place(file, partial / file.name)
        if tree.is_file():
            shutil.copy2(tree, partial / "tree.json")
        add(partial)
        (partial / "custom_generate").mkdir()
        (partial / "custom_generate" / "generate.py").write_text(GENERATE, encoding="utf-8")
    if copied:
        log.info(
            "%s lies on another file system than what it is made of: %s were copied, not linked",
            *(out, decimal(copied)),
        )
    if missing := missing_for_server():
        log.info(
            "transformers serve needs %s, which are not installed here: pip install "
            "'medusa-exp[serve]'",
            ", ".join(missing),
        )


def is_whole_model(place: Path) -> bool:
    """Is this a directory that `write` has made?"""
    ours = place / "custom_generate" / "generate.py"
    return ours.is_file() and "medusa_exp" in ours.read_text("utf-8", errors="replace")


def check_files(target: str, identity: str, whose: str) -> None:
    """Compare the files of a model with the identity that heads know, or will know, it by.

    Args:
        target: as `write` takes it.
        identity: of `Backbone.identity`; empty where imported heads do not say.
        whose: the heads, in words.

    Raises:
        UserError: they are another model's.
    """
    source = _directory(target)
    if identity and identity_of_files(str(source)) not in (None, identity):
        raise UserError(
            f"{whose}, and the files in {source} are another model's. Where "
            "tokenizer.resize_embedding=true has added rows that its files lack: save the model "
            "with its tokenizer and these rows, and set model.path to that directory."
        )


def missing_for_server() -> list[str]:
    """Return the packages that `transformers serve` needs and this environment lacks."""
    return [name.replace("_", "-") for name in _SERVER_NEEDS if find_spec(name) is None]


def _directory(target: str) -> Path:
    path = Path(target).expanduser()
    if not path.is_dir():
        try:
            path = Path(cached_file(target, "config.json", local_files_only=True)).parent
        except OSError as error:
            raise UserError(f"the model {target} is not on this machine: {error}") from error
    if is_adapters(path):
        raise UserError(
            f"{path} holds adapters, no model: train with train.lora.output=merged, which writes "
            "a model that can be served."
        )
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path} holds no weights in safetensors.")
    return path


def _files(source: Path, with_code: bool) -> Iterator[Path]:
    for file in sorted(source.iterdir()):
        is_wanted = file.suffix not in _NOT_TAKEN and not file.name.startswith(".")
        if file.is_file() and is_wanted and (with_code or file.suffix != ".py"):
            yield file


def _place(source: Path, target: Path) -> int:
    """Link weights, or copy them where that cannot be; return the bytes that were copied so.

    Small files are always copied, and do not count: they are the ones that people edit.
    """
    if source.suffix == ".safetensors":  # by its own name, for a hub's cache gives it another
        return 0 if link_or_copy(source, target) else target.stat().st_size
    shutil.copy2(source, target)
    return 0
