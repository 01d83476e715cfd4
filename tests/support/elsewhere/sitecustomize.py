"""Makes of this machine another one, for the processes that find this folder on their path.

The variable ELSEWHERE says what is different. Python imports this before anything else, in child
processes too.
"""

import errno
import multiprocessing
import os
import sys

WHAT = os.environ.get("ELSEWHERE", "")


def _refuse_locks(*given):
    raise OSError(errno.ENOLCK, "No locks available")


def _no_entry(*given):
    raise KeyError("getpwuid(): uid not found: 12345")


class _NoOperators:
    def __getattr__(self, name):
        raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute '{name}'")


if WHAT == "resource":
    import psutil  # noqa: F401  its part for Linux wants the module, that for Windows does not

if WHAT in ("resource", "fcntl", "pwd", "pyarrow"):
    sys.modules[WHAT] = None  # an import of it fails
elif WHAT in ("sched_getaffinity", "posix_fallocate"):
    delattr(os, WHAT)
elif WHAT in ("spawn", "forkserver"):
    multiprocessing.set_start_method(WHAT)
elif WHAT == "nobody":
    import pwd

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        os.environ.pop(name, None)
    pwd.getpwuid = _no_entry
elif WHAT == "no_locks":
    import fcntl

    fcntl.flock = _refuse_locks
elif WHAT == "no_onednn":
    import torch

    torch.ops.mkldnn = _NoOperators()
    torch.backends.mkldnn.is_available = lambda: False
