"""Python imports this by itself where its folder is on PYTHONPATH: what emulates a GPU goes in.

As soon as torch has been imported its operations are replaced, and so are the project's kernels.
`emulated.py` says how a process is started.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


def _after_torch(module: ModuleType) -> None:
    import emulated_operations  # noqa: F401


def _after_runtime(module: ModuleType) -> None:
    from emulated_kernels import EmulatedKernels

    module.CupyKernels = EmulatedKernels  # type: ignore[attr-defined]


def _after_inductor(module: ModuleType) -> None:
    import emulated_triton  # noqa: F401


_AFTER = {
    "torch": _after_torch,
    "torch._inductor.runtime.triton_heuristics": _after_inductor,
    "medusa_exp.decode.cuda.runtime": _after_runtime,
}


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, name: str) -> None:
        self._loader, self._name = loader, name

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _AFTER[self._name](module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._left = set(_AFTER)

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._left:
            return None
        self._left.remove(name)
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path)  # type: ignore
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, name)
                return spec
        return None


sys.meta_path.insert(0, _Finder())
