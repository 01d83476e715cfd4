"""Which tree a run decodes with."""

from importlib import resources
from pathlib import Path

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.files import read_json, sha256_file
from medusa_exp.tree.tree import Tree, chain

CALIBRATION = "calibration.json"


def heads_sha256(out: Path) -> str:
    """Name the heads of a run, to know what a calibration was made with."""
    return sha256_file(out / "heads" / "model.safetensors")


def choose_tree(config: Config, out: Path, num_heads: int) -> Tree:
    """Return the tree that `tree` names.

    A calibrated one is read from calibration.json, not from tree.json, which holds whatever tree
    was used last.

    Raises:
        UserError: there is no calibration yet, or the tree is deeper than there are heads.
    """
    kind = config.tree.kind
    if kind == "chain":
        return chain(num_heads)
    if kind == "calibrated":
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
        tree = Tree(**calibration["tree"])
    else:
        file = resources.files("medusa_exp.tree") / f"{kind}.json"
        with resources.as_file(file) as path:
            tree = Tree.from_paths(read_json(path)["paths"])
    if tree.depth > num_heads:
        raise UserError(
            f"tree={kind} is {tree.depth} guesses deep, and there are {num_heads} heads: raise "
            "head.num_heads and train again, or choose another tree."
        )
    return tree
