"""Which tree a run decodes with."""

from importlib import resources
from pathlib import Path
from typing import Any

from medusa_exp.config import Config, TreeConfig
from medusa_exp.errors import UserError
from medusa_exp.files import read_json, sha256_file
from medusa_exp.tree.tree import Tree, chain

CALIBRATION = "calibration.json"


def heads_sha256(out: Path) -> str:
    """Name the heads of a run, to know what a calibration was made with."""
    return sha256_file(out / "heads" / "model.safetensors")


def choose_tree(config: Config, out: Path, num_heads: int, batch_size: int = 1) -> Tree:
    """Return the tree that `tree` names, for so many rows at a time.

    A calibrated one is read from calibration.json, not from tree.json, which holds whatever tree
    was used last.

    Raises:
        UserError: there is no calibration yet, no such tree, or it is deeper than there are heads.
    """
    kind = config.tree.kind
    if kind == "chain":
        tree = chain(num_heads)
    elif kind == "custom":
        tree = _custom(config.tree)
    elif kind == "medusa_63":
        file = resources.files("medusa_exp.tree") / "medusa_63.json"
        with resources.as_file(file) as path:
            tree = Tree.load(path)
    else:
        calibration = _calibration(out)
        best = _of_batch_size(calibration["batch_sizes"], batch_size)
        tree = Tree(**_point(best, config.tree.num_nodes if kind == "calibrated" else None)["tree"])
        if kind == "dynamic":
            tree = _dynamic(Tree(**calibration["choices"]), config.tree.num_nodes or len(tree))
    if tree.depth > num_heads:
        raise UserError(
            f"tree={kind} is {tree.depth} guesses deep, and there are {num_heads} heads: raise "
            "head.num_heads and train again, or choose another tree."
        )
    return tree


def _of_batch_size(entries: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """Return what was found for the next batch size at or below this one, else for the smallest."""
    below = [entry for entry in entries if entry["batch_size"] <= batch_size]
    return max(below, key=lambda e: e["batch_size"]) if below else entries[0]


def _point(entry: dict[str, Any], num_nodes: int | None) -> dict[str, Any]:
    """Return what was chosen, or the largest tree of the curve with at most so many nodes."""
    if num_nodes is None:
        return entry
    fitting = [point for point in entry["curve"] if point["num_nodes"] <= num_nodes]
    return max(fitting, key=lambda point: point["num_nodes"])


def _dynamic(choices: Tree, num_nodes: int) -> Tree:
    return Tree(choices.parents, choices.ranks, min(num_nodes, len(choices)))


def _custom(settings: TreeConfig) -> Tree:
    if bool(settings.path) == bool(settings.paths):
        raise UserError("tree=custom needs either tree.path, a JSON file, or tree.paths.")
    if settings.path:
        return Tree.load(Path(settings.path))
    try:
        return Tree.from_paths(settings.paths)
    except ValueError as error:
        raise UserError(f"tree.paths: {error}") from error


def _calibration(out: Path) -> dict[str, Any]:
    calibration = read_json(out / CALIBRATION)
    if calibration is None:
        raise UserError(
            f"{out / CALIBRATION} does not exist: run stage calibrate, or set tree=chain."
        )
    if calibration.get("heads_sha256") != heads_sha256(out):
        raise UserError(
            f"{out / CALIBRATION} was measured with other heads than those in {out / 'heads'}: "
            "run stage calibrate again, or set tree=chain."
        )
    if "batch_sizes" not in calibration:
        raise UserError(f"{out / CALIBRATION} is of an older version: run stage calibrate again.")
    return calibration
