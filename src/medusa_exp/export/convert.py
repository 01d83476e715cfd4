"""Turn pickled heads into safetensors: `python -m medusa_exp.export.convert FILE.pt [OUT]`.

Loaded are tensors alone (`weights_only=True`): code that a pickle may hold is refused, not run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from medusa_exp.errors import UserError
from medusa_exp.model.convert import read_pickle
from medusa_exp.runs.files import publish


def convert(source: Path, target: Path) -> int:
    """Write the tensors of a pickle as safetensors; return their number.

    Tensors that share memory, as blocks of FasterDecoding's trainer do, are written for each name.

    Raises:
        UserError: there is no such file, or it holds anything but tensors under names.
    """
    if not source.is_file():
        raise UserError(f"{source} is no file.")
    found = read_pickle(source)
    with publish(target) as partial:
        save_file(
            {str(name): tensor.clone().contiguous() for name, tensor in found.items()},
            partial,
            metadata={"format": "pt"},
        )
    return len(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m medusa_exp.export.convert")
    parser.add_argument("file", type=Path, help="pickled heads: .pt, .pth or .bin")
    parser.add_argument("out", type=Path, nargs="?", help="by default FILE.safetensors beside it")
    asked = parser.parse_args(arguments)
    target = asked.out or asked.file.with_suffix(".safetensors")
    try:
        number = convert(asked.file, target)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{target}: {number} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
