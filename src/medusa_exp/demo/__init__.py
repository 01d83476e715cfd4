"""The model and heads that come with this package, for `+experiment=demo` and `quickstart`.

A Llama of a million parameters, pretrained on generated chats, seven heads for it, and their tree;
`scripts/make_demo.py` made them. The quickstart takes the Llama alone, and trains heads of its own.
"""

from pathlib import Path

from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json, sha256_file

PLACE = Path(__file__).parent
WEIGHTS = "model.safetensors"
_DIGESTS = "digests.json"


def digests() -> dict[str, str]:
    """Return the sha256 of each file that comes with the package, by its path in this directory."""
    files = sorted(path for path in PLACE.rglob("*.*") if path.suffix not in (".py", ".pyc"))
    return {
        path.relative_to(PLACE).as_posix(): sha256_file(path)
        for path in files
        if path.name != _DIGESTS
    }


def check() -> None:
    """Raise a UserError unless the files are those that were published."""
    wanted, found = read_json(PLACE / _DIGESTS, {}), digests()
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{PLACE / name} is not the file of the demo: install medusa-exp again."
            )


def check_used(path: str | None) -> None:
    """Do the same where a model that is to be loaded is the one that comes along."""
    if path is not None and Path(path).is_relative_to(PLACE):
        check()
