"""The command line in forks of one process that has all imported, with faults of its file system.

    with Commands(folder) as commands:
        commands.run("stages=[report]", "run_dir=run", cwd=place, fault=Fault("kill", 12))

A fork saves a command the ten seconds that importing takes. What a fault is, is in
`file_faults.cpp`, which g++ compiles and Linux loads before the C library.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("file_faults.cpp")
GXX = shutil.which("g++") if sys.platform == "linux" else None
ACTIONS = ["none", "look", "kill", "full", "signal", "limit"]
SECONDS = 120.0
"""More than any command takes; one that takes longer hangs."""


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th call that changes a file.

    none; look: all are counted and written down; kill, in the middle of a write; full: the disk is,
    from here on; signal. Or no file can become larger than so many bytes: limit.
    """

    action: str = "none"
    at: int = 0
    signal: int = 0


NONE = Fault()


@dataclass
class Ended:
    """How a command has ended."""

    status: int
    """As a shell has it; less than 0 after a signal, None where it never ended."""
    stdout: str
    stderr: str
    calls: list[str]
    """`KIND PATH` of the calls that were looked at, or of the one at which the fault was."""
    seconds: float
    modules: list[str] = field(repr=False, default_factory=list)
    """That were imported."""


def build_library(folder: Path) -> Path:
    """Compile `file_faults.cpp`."""
    library = folder / "file_faults.so"
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
    subprocess.run([*command, "-ldl"], check=True)
    return library


class Running:
    """A command on its way."""

    def __init__(self, commands: "Commands", pid: int, out: Path) -> None:
        self.commands, self.pid, self.out = commands, pid, out
        self._start = time.monotonic()

    def kill(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = SECONDS) -> Ended:
        """Wait for its end.

        Raises:
            TimeoutError: it has not come.
        """
        status = self.commands.ask(wait=self.pid, timeout=timeout)["status"]
        seconds = time.monotonic() - self._start
        with suppress(ProcessLookupError):  # what it has started and not ended
            os.killpg(self.pid, signal.SIGKILL)
        if status is None:
            raise TimeoutError(f"no end after {timeout} s: {self._text('err')[-3000:]}")
        code = os.waitstatus_to_exitcode(status)
        calls = self._text("calls").splitlines()
        modules = self._text("modules").splitlines()
        return Ended(code, self._text("out"), self._text("err"), calls, seconds, modules)

    def _text(self, suffix: str) -> str:
        path = self.out / suffix
        return path.read_text(errors="replace") if path.is_file() else ""


class Commands:
    """The process from which commands are forked, its library of faults, and what they print."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._number = folder, 0
        library = build_library(folder)
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            "LD_PRELOAD": str(library),
            "HF_HUB_OFFLINE": "1",
            "COVERAGE_PROCESS_CONFIG": "",
            "COLUMNS": "200",
        }
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.communicate()

    def ask(self, **request: Any) -> Any:
        """Ask the process for something."""
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(
        self,
        *arguments: str,
        cwd: Path,
        fault: Fault = NONE,
        stdin: str = "",
        **environment: str,
    ) -> Running:
        """Start a command in a directory, below which its faults are."""
        self._number += 1
        out = self.folder / f"command-{self._number}"
        out.mkdir()
        (out / "in").write_text(stdin)
        (cwd / "tmp").mkdir(exist_ok=True)
        environment = {"HOME": str(cwd), "TMPDIR": str(cwd / "tmp"), **environment}
        pid = self.ask(
            arguments=arguments,
            cwd=str(cwd),
            fault=asdict(fault),
            out=str(out),
            environment=environment,
        )["pid"]
        return Running(self, pid, out)

    def run(self, *arguments: str, timeout: float = SECONDS, **options: Any) -> Ended:
        """Run a command to its end."""
        return self.start(*arguments, **options).wait(timeout)

    def learn(self, modules: list[str]) -> None:
        """Have the process import these modules, so that no fork has to."""
        assert self.ask(modules=modules)["threads"] == 1, "a fork would lack its threads"


def serve() -> None:
    """Fork a command for each line of stdin that asks for one."""
    import torch

    import medusa_exp.cli

    torch.set_num_threads(1)
    assert medusa_exp.cli.STAGES
    replies = os.dup(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = {"status": _wait(request["wait"], request["timeout"])}
        elif "modules" in request:
            for name in request["modules"]:
                with suppress(Exception):
                    importlib.import_module(name)
            gc.freeze()
            names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
            # Of Arrow's allocator, which gives each fork one of its own.
            reply = {"threads": len(names) - names.count("jemalloc_bg_thd\n")}
        else:
            pid = os.fork()
            if not pid:
                os.close(replies)
                _run(request)
            reply = {"pid": pid}
        os.write(replies, json.dumps(reply).encode() + b"\n")


def _wait(pid: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _run(request: dict[str, Any]) -> None:
    """Do as `python -m medusa_exp` does, and end this process."""
    import medusa_exp.cli

    os.setsid()
    out = Path(request["out"])
    for descriptor, name in enumerate(("in", "out", "err")):
        opened = os.open(out / name, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)  # what was read ahead of the old one is not for us
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    sys.argv = ["medusa_exp", *request["arguments"]]
    _arm(request["cwd"], out, **request["fault"])
    status = 0
    try:
        medusa_exp.cli.main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else bool(error.code)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    _arm(request["cwd"], out, "none", 0, 0)
    with suppress(OSError):
        sys.stdout.flush()
    (out / "modules").write_text("\n".join(sys.modules))
    os._exit(status)


def _arm(cwd: str, out: Path, action: str, at: int, signal: int) -> None:
    log = os.open(out / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at if action == "limit" else most, most))
    arm = ctypes.CDLL(None).faults_arm
    arm(cwd.encode(), ACTIONS.index(action), ctypes.c_long(at), signal, log)


if __name__ == "__main__":
    serve()
