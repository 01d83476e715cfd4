"""A run's files as versioned artifacts of W&B, and which of them it was made from.

    data set -> regenerated responses -> hidden states -> heads, tree -> evaluation, report

What a stage starts from is an input of the run, what it makes an output; an artifact's metadata
names by their hashes what it was made from, so that the chain can be followed within one run too.
Data sets, responses and hidden states are large, and may be private: theirs hold hashes and counts.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb

from medusa_exp.config import Config, named_variables
from medusa_exp.config.privacy import shareable, shareable_text
from medusa_exp.runs.files import link_or_copy, read_json, sha256_file
from medusa_exp.runs.schemas import SEAL
from medusa_exp.runs.seals import is_of_system

_TEXTS = (".json", ".jsonl", ".html", ".jinja", ".txt")
_PLACES = {"config.json": "backbone", "tokenizer_source.json": "path"}
"""File of the heads -> its field that holds a path of the config, which a variable may give."""


@dataclass
class Item:
    """An artifact to be."""

    name: str
    """What it is, after the experiment's name: heads."""
    kind: str
    """W&B's type of artifact."""
    files: dict[str, Path] = field(default_factory=dict)
    """Name in the artifact -> file."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Where there are no files: what stands for the content, as NAME.json."""
    metadata: dict[str, Any] = field(default_factory=dict)
    is_input: bool = False


def log_artifacts(run: Any, config: Config, out: Path, stage: str) -> None:
    """Log what a stage was made from and what it made."""
    if stage in _ITEMS:
        for item in _ITEMS[stage](config, out):
            _log(run, config, out, item)


def log_code(run: Any, out: Path) -> None:
    """Log this package's source, and the changes that no commit has."""
    run.log_code(str(Path(__file__).parents[1]), name="medusa_exp-source")
    diff = out / "uncommitted.diff"
    if diff.is_file():
        kept = _staged(diff, Path(run.dir), out)  # else W&B warns that it makes a link
        run.save(str(kept), base_path=run.dir, policy="now")


def _of_train(config: Config, out: Path) -> Iterator[Item]:
    made_from = {}
    for item in _inputs(config, out):
        made_from[item.name] = item.facts
        yield item
    names = read_json(out / "run.json")["stages"]["train"].get("metrics", [])
    found = read_json(out / "metrics.json", {})
    numbers = {name: found[name] for name in names if name in found}
    yield _heads(out, made_from=made_from, metrics=numbers)


def _inputs(config: Config, out: Path) -> Iterator[Item]:
    run, data = read_json(out / "run.json"), read_json(out / "data.json")
    files = {Path(path).name: digest for path, digest in run["data"].items()}
    dataset = {"key": data["key"], "sources": data["sources"], "sha256": files}
    yield Item("dataset", "dataset", facts=dataset, is_input=True)
    if config.train.text == "regenerated" and (answers := read_json(out / "regenerated.json")):
        yield Item("answers", "dataset", facts=answers, is_input=True)
    splits = run["stages"]["train"].get("features", {})
    folder = Path(config.cache_dir) / "features"
    found = {split: read_json(folder / key / "summary.json") for split, key in splits.items()}
    if found:
        yield Item("features", "features", facts=found, is_input=True)


def _of_calibration(config: Config, out: Path) -> Iterator[Item]:
    yield _tree(out)


def _of_evaluation(config: Config, out: Path) -> Iterator[Item]:
    yield _heads(out, is_input=True)
    yield _tree(out, is_input=True)
    files = {name: out / name for name in ("metrics.json", "records.jsonl", "samples.jsonl")}
    yield Item("evaluation", "evaluation", files, metadata=_made_by(out))


def _of_report(config: Config, out: Path) -> Iterator[Item]:
    yield Item("report", "report", {"report.html": out / "report.html"}, metadata=_made_by(out))


def _heads(out: Path, is_input: bool = False, **metadata: Any) -> Item:
    found = [path for path in sorted((out / "heads").iterdir()) if not is_of_system(path)]
    # What is sent may have other words than what was sealed, see `_staged`. Their card, which also
    # says what was measured later, would make other heads of them.
    left_out = (SEAL, "README.md")
    files = {path.name: path for path in found if path.is_file() and path.name not in left_out}
    known = {**read_json(out / "heads" / "config.json"), "sha256": _heads_sha256(out)}
    if "backbone" in known:  # not of a model without a name
        known["backbone"] = named_variables(str(known["backbone"]), out)
    return Item("heads", "model", files, metadata={**known, **metadata}, is_input=is_input)


def _tree(out: Path, is_input: bool = False) -> Item:
    names = ("tree.json", "calibration.json")
    files = {name: out / name for name in names if (out / name).is_file()}
    made_from = {"heads": _heads_sha256(out)}
    return Item("tree", "tree", files, metadata={"made_from": made_from}, is_input=is_input)


def _made_by(out: Path) -> dict[str, Any]:
    made_from = {"heads": _heads_sha256(out)}
    if (out / "tree.json").is_file():
        made_from["tree"] = sha256_file(out / "tree.json")
    return {"made_from": made_from}


def _heads_sha256(out: Path) -> str | None:
    weights = out / "heads" / "model.safetensors"
    return sha256_file(weights) if weights.is_file() else None


def _log(run: Any, config: Config, out: Path, item: Item) -> None:
    name = re.sub(r"[^\w.-]", "_", f"{config.name}-{item.name}")
    artifact = wandb.Artifact(name, item.kind, metadata=shareable(item.metadata))
    (out / "wandb" / "staged").mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out / "wandb" / "staged"))
    if item.facts:
        path = staging / f"{item.name}.json"
        path.write_text(json.dumps(shareable(item.facts), indent=1, sort_keys=True))
        artifact.add_file(str(path), policy="immutable", skip_cache=True)
    for entry, source in item.files.items():
        staged = str(_staged(source, staging, out))
        artifact.add_file(staged, name=entry, policy="immutable", skip_cache=True)
    # `use_artifact` does just this to a new artifact; but it waits for the server, and refuses to
    # work offline, where the record of it would be uploaded by `wandb sync` like any other.
    run._log_artifact(  # private: wandb 0.31
        artifact, aliases=["latest", run.id], is_user_created=True, use_after_commit=item.is_input
    )


def _staged(source: Path, place: Path, out: Path) -> Path:
    """Return a file that stays as it is until it is uploaded, whatever becomes of `source`.

    Our files are replaced as a whole, so a hard link keeps what was there, and takes no space.
    """
    staged = place / source.name
    if source.suffix in (*_TEXTS, ".diff"):
        text = source.read_text(encoding="utf-8")
        if (clean := shareable_text(_without_variables(source.name, text, out))) != text:
            staged.write_text(clean, encoding="utf-8")
            return staged
    link_or_copy(source, staged)
    return staged


def _without_variables(name: str, text: str, out: Path) -> str:
    """Return the text of a file; elsewhere than in these fields, words that a variable has too
    are the file's own, such as a vocabulary's.
    """
    if name not in _PLACES:
        return text
    content = json.loads(text)
    place = str(content.get(_PLACES[name]))
    if (shown := named_variables(place, out)) == place:
        return text
    return json.dumps({**content, _PLACES[name]: shown}, indent=1)


_ITEMS: dict[str, Callable[[Config, Path], Iterator[Item]]] = {
    "train": _of_train,
    "calibrate": _of_calibration,
    "evaluate": _of_evaluation,
    "report": _of_report,
}
