"""Work on many items in processes of a Ray cluster, by Ray Data.

For `regenerate.workers` and `train.feature_workers`.

Every worker makes what it works with once (a model, on a GPU of its own where there is one) and is
given item after item. Ray looks for a cluster where RAY_ADDRESS says, or makes one of this machine.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from medusa_exp.errors import UserError

Work = Callable[[str], str]


def map_on_ray(
    make: Callable[..., Work],
    arguments: dict[str, Any],
    items: Sequence[str],
    *,
    num_workers: int,
    use_gpu: bool,
) -> Iterator[str]:
    """Yield what `make(**arguments)` returns for each item, in the order in which they are done.

    Raises:
        UserError: Ray is not installed, or what the work raises.
    """
    try:
        import ray.data
    except ImportError as error:
        raise UserError(f"Ray Data is needed: pip install 'medusa-exp[ray]' ({error}).") from error

    with ray_cluster():
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the caller has one
        context.execution_options.verbose_progress = False
        # An item a block: what is done is written down item by item.
        dataset = ray.data.from_items([{"item": i} for i in items], override_num_blocks=len(items))
        done = dataset.map(
            _Worker,
            fn_constructor_args=(make, arguments, str(Path.cwd())),
            concurrency=num_workers,
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
        )
        for row in done.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield row["result"]


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Be connected to Ray: as before, or for so long."""
    import ray

    if ray.is_initialized():  # by a launcher, or by the caller
        yield
        return
    ray.init(include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


class _Worker:
    """Makes what it works with at its first item: an error on the way then is an item's result."""

    def __init__(self, make: Callable[..., Work], arguments: dict[str, Any], where: str) -> None:
        os.chdir(where)  # paths of the config may be relative
        self._make = partial(make, **arguments)

    @cached_property
    def work(self) -> Work:
        return self._make()

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        try:
            return {"result": self.work(row["item"]), "error": ""}
        except UserError as error:
            return {"result": "", "error": str(error)}
