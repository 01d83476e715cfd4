"""Is this process alone, or one of several? What launchers leave in the environment, and who wins.

The command starts its processes itself (`launch.py`), so that the one a user starts is alone
whatever its environment says. Pods of a training operator, shells inside torchrun, interactive
allocations of SLURM and leftovers of other jobs all set ranks; libraries believe them, and would
leave all writing to a first process that does not exist.
"""

import logging
import os

from lightning.pytorch.utilities import rank_zero_only

from medusa_exp.errors import UserError

log = logging.getLogger(__name__)

_RANKS = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "JSM_NAMESPACE_RANK",
)
_SIZES = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "JSM_NAMESPACE_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
"""Variables of a launcher's processes alone: SLURM_NTASKS stands in an allocation's shell too."""


def be_alone() -> None:
    """Make this process the only one; say so where its environment says otherwise."""
    said = [f"{name}={os.environ[name]}" for name in _RANKS if _number(name) > 0]
    said += [
        f"{name}={os.environ[name]}" for name in (*_SIZES, "SLURM_NTASKS") if _number(name) > 1
    ]
    if said:
        log.info("one device is one process: %s of the environment is ignored", ", ".join(said))
    rank_zero_only.rank = 0


def refuse_other_launchers(devices: int) -> None:
    """Let no launcher's processes each start `devices` more.

    Raises:
        UserError: this is one of several; naming the launcher's variable.
    """
    for name in _SIZES:
        if _number(name) > 1:
            raise UserError(
                f"train.devices={devices}: the command starts its processes itself, and a launcher "
                f"says that this is one of several already ({name}={os.environ[name]}). Start it "
                f"once, without torchrun, srun or mpirun; where {name} is left over from another "
                f"job, unset it: env -u {name} python -m medusa_exp ..."
            )


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0
