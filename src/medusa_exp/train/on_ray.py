"""One training on the machines of a Ray cluster, Lightning inside: `train.strategy=ray`.

Ray Train places `train.devices` workers, a GPU or a core each, and starts all of them anew where
one is lost; they go on from the run directory's last checkpoint, which therefore lies on a disk
that all share. Ray looks for a cluster where RAY_ADDRESS says, or makes one of this machine.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from medusa_exp.config import Config, from_hydra, to_dict
from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.record import annotate, collect
from medusa_exp.train.ray_data import ray_cluster

_RESULT = "result.json"


def train_on_ray(config: Config, out: Path) -> dict[str, float]:
    """Run the training in `train.devices` workers; return the metrics of the first.

    Raises:
        UserError: as the training itself; Ray is not installed; or more workers were lost than
            `train.max_failures` allows.
    """
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise UserError(
            f"train.strategy=ray needs Ray Train: pip install 'medusa-exp[ray]' ({error})."
        ) from error
    from medusa_exp.model.loading import pick_device

    if config.train.resume == "never":  # once, and not after each loss of a worker
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    folder = (out / "ray").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    trainer = TorchTrainer(
        _train_as_worker,
        train_loop_config={
            "config": to_dict(config),
            "out": str(out.absolute()),
            "result": str(folder / _RESULT),
            "directory": str(Path.cwd()),
        },
        scaling_config=ScalingConfig(
            num_workers=config.train.devices,
            use_gpu=pick_device(config.device).type == "cuda",
        ),
        run_config=RunConfig(
            name=out.name,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
        ),
    )
    try:
        with ray_cluster():
            trainer.fit()
    except Exception as error:  # Ray's own, of several kinds: all say that the training is lost
        raise UserError(
            f"train.strategy=ray: the training failed, and {out / 'checkpoints'} has what there is "
            f"of it. The same command with the same run_dir goes on. Ray said: {error}"
        ) from error
    found = read_json(folder / _RESULT, {})
    shutil.rmtree(folder, ignore_errors=True)
    if "error" in found:
        raise UserError(found["error"])
    annotate(**found["notes"])
    return dict(found["metrics"])


def _train_as_worker(job: dict[str, Any]) -> None:
    """Train as one of several workers, and leave the result if it is the first."""
    from lightning.pytorch.utilities import rank_zero_only
    from ray.train import get_context

    from medusa_exp.stages.train import train
    from medusa_exp.tracking.terminal import quiet_libraries

    os.chdir(job["directory"])  # paths of the config may be relative
    result = Path(job["result"])
    if result.is_file():  # somebody has found what no further try will mend
        return
    rank_zero_only.rank = get_context().get_world_rank()
    quiet_libraries(["train"])
    config = from_hydra(OmegaConf.create(job["config"]))
    config.train.resume = "auto"
    found: dict[str, Any] = {}
    with collect() as notes:
        try:
            found = {"metrics": train(config, Path(job["out"])), "notes": notes}
        except UserError as error:
            found = {"error": str(error)}
            write_json(result, found)
            raise
    if rank_zero_only.rank == 0:
        write_json(result, found)


def ray_parts(*, find_unused_parameters: bool) -> tuple[Any, Any]:
    """Return Lightning's strategy and cluster environment for a worker of Ray Train."""
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

    strategy = RayDDPStrategy(find_unused_parameters=find_unused_parameters)
    return strategy, RayLightningEnvironment()
