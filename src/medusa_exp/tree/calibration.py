"""What calibration.json holds: which tree is fastest at which batch size, and its promise."""

from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json, sha256_file, write_json
from medusa_exp.tree.tree import Tree

CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class Point:
    """A tree, and what answering the calibration's prompts over it takes."""

    num_nodes: int
    tokens_per_step: float
    step_seconds: float
    expected_seconds: float
    """Of all answers together, each in a full batch."""
    tokens_per_second: float
    tree: Tree
    is_rehearsed: bool = False
    """Do the seconds come from whole answers, not from steps alone?"""


@dataclass(frozen=True)
class Curve:
    """The trees that were timed at one batch size, and the fastest of them."""

    batch_size: int
    plain_step_seconds: float
    prefill_seconds: float
    plain_expected_seconds: float
    curve: list[Point]
    num_nodes: int
    """Of the chosen tree, as what follows."""
    tree: Tree
    predicted_tokens_per_step: float
    predicted_speedup: float

    def fastest(self) -> list[Point]:
        """Return the points, the fastest first."""
        return sorted(self.curve, key=lambda point: -point.tokens_per_second)

    def up_to(self, num_nodes: int) -> Tree:
        """Return the largest tree of at most so many nodes."""
        fitting = [point.tree for point in self.curve if point.num_nodes <= num_nodes]
        return max(fitting, key=len)


@dataclass(frozen=True)
class Calibration(Curve):
    """All curves; at its own level that of the smallest batch."""

    num_positions: int
    rank_share: list[list[float]]
    """[head][rank]: how often that guess came true."""
    node_probability: list[float]
    """How often a step accepts each node of the tree."""
    batch_sizes: list[Curve]
    """From the smallest batch on."""
    break_even_batch_size: int | None
    """The smallest at which no tree is faster than plain decoding."""
    choices: Tree
    """The largest tree that was grown: what tree=dynamic picks from."""
    heads_sha256: str

    def of_batch_size(self, batch_size: int) -> Curve:
        """Return what was found for the next size at or below this one, else for the smallest."""
        below = [curve for curve in self.batch_sizes if curve.batch_size <= batch_size]
        return below[-1] if below else self.batch_sizes[0]


def heads_sha256(out: Path) -> str:
    """Name the heads of a run, to know what a calibration was made with."""
    return sha256_file(out / "heads" / "model.safetensors")


def save_calibration(calibration: Calibration, out: Path) -> None:
    """Write it into a run directory."""
    write_json(out / CALIBRATION, asdict(calibration))


def load_calibration(out: Path) -> Calibration:
    """Read a run's calibration.

    Raises:
        UserError: there is none, or it is of other heads or of another version.
    """
    path = out / CALIBRATION
    found = read_json(path)
    if found is None:
        raise UserError(f"{path} does not exist: run stage calibrate, or set tree=chain.")
    if found.get("heads_sha256") != heads_sha256(out):
        raise UserError(
            f"{path} was measured with other heads than those in {out / 'heads'}: run stage "
            "calibrate again, or set tree=chain."
        )
    try:
        return msgspec.convert(found, Calibration)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path} is of another version ({error}): run stage calibrate again."
        ) from error
