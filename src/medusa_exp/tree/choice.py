"""Which tree a run decodes with."""

from importlib import resources
from pathlib import Path

from medusa_exp.config import Config, TreeConfig
from medusa_exp.errors import UserError
from medusa_exp.tree.calibration import load_calibration
from medusa_exp.tree.tree import Tree, chain


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
        calibration, num_nodes = load_calibration(out), config.tree.num_nodes
        curve = calibration.of_batch_size(batch_size)
        if kind == "dynamic":
            tree = _dynamic(calibration.choices, num_nodes or curve.num_nodes)
        else:
            tree = curve.tree if num_nodes is None else curve.up_to(num_nodes)
    if tree.depth > num_heads:
        raise UserError(
            f"tree={kind} is {tree.depth} guesses deep, and there are {num_heads} heads: raise "
            "head.num_heads and train again, or choose another tree."
        )
    return tree


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
