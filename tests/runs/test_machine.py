"""What is asked of a machine, on made-up ones."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from medusa_exp.errors import UserError
from medusa_exp.runs import machine

CPU = torch.device("cpu")


class _NoOperators:
    """`torch.ops.mkldnn` of a torch that was built without oneDNN."""

    def __getattr__(self, name):
        raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute '{name}'")


@pytest.fixture(autouse=True)
def forgotten():
    machine.has_arithmetic.cache_clear()
    yield
    machine.has_arithmetic.cache_clear()


def _groups(root: Path, cgroup: str, **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("-", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("", {}, 8),
        ("0::/\n", {"cpu-max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu-max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu-max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a__cpu-max": "250000 100000\n", "a__b__cpu-max": "max 100000\n"}, 2),
        ("0::/host/only\n", {"cpu-max": "400000 100000\n"}, 4),
        (
            "5:memory:/x\n4:cpu,cpuacct:/d/1\n0::/\n",
            {
                "cpu,cpuacct__d__1__cpu-cfs_quota_us": "600000",
                "cpu,cpuacct__d__1__cpu-cfs_period_us": "100000",
            },
            6,
        ),
        ("1:cpu:/d\n", {"cpu__cpu-cfs_quota_us": "-1", "cpu__cpu-cfs_period_us": "100000"}, 8),
        ("not what it should be\n", {}, 8),
    ],
)
def test_cores_are_those_of_affinity_and_quota(monkeypatch, tmp_path, cgroup, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.usable_cores(_groups(tmp_path, cgroup, **files)) == cores


def test_cores_where_the_system_knows_no_affinity(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert machine.usable_cores(tmp_path) == 5


def test_threads_are_not_more_than_the_cores_unless_they_were_chosen(monkeypatch):
    before, chosen = torch.get_num_threads(), []
    monkeypatch.setattr(machine, "usable_cores", lambda: before - 1)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine.limit_threads()
    assert not chosen
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.limit_threads()
    assert chosen == [before - 1]
    for none in ("0", "-1", "", "all"):  # which torch takes for not set
        monkeypatch.setenv("OMP_NUM_THREADS", none)
        machine.limit_threads()
    assert chosen == [before - 1] * 5


def test_arithmetic_is_timed_where_torch_knows_nothing(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", _NoOperators())
    for rate, is_fast in ((9e9, True), (1e9, False)):
        machine.has_arithmetic.cache_clear()
        rates = {torch.bfloat16: rate, torch.float32: 2e9}
        monkeypatch.setattr(machine, "matrix_rate", lambda _, dtype, *a, r=rates, **k: r[dtype])
        assert machine.has_arithmetic(CPU, torch.bfloat16) is is_fast
    assert machine.has_arithmetic(CPU, torch.float32)


def test_a_processor_whose_bfloat16_is_only_taken_apart_has_none(monkeypatch):
    # Of AVX-512 without its bfloat16 oneDNN says that it is supported.
    monkeypatch.setattr(torch.ops, "mkldnn", _Supported())
    for word, has in (("avx512_f", False), ("avx512_bf16", True), ("amx_bf16", True)):
        machine.has_arithmetic.cache_clear()
        known = {"architecture": "x86_64", word: True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda k=known: k, raising=False)
        assert machine.has_arithmetic(CPU, torch.bfloat16) is has


class _Supported:
    def _is_mkldnn_bf16_supported(self):
        return True


def test_nothing_but_float32_is_trusted_on_other_devices():
    assert not machine.has_arithmetic(torch.device("mps"), torch.bfloat16)
    assert machine.has_arithmetic(torch.device("mps"), torch.float32)


def test_an_apple_gpu_is_taken_only_by_name(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.pick_device("auto") == CPU
    machine._say_untried.cache_clear()
    assert machine.pick_device("mps") == torch.device("mps")
    assert "has not been tried" in caplog.text
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=mps, but"):
        machine.pick_device("mps")


def test_a_user_without_a_home_gets_one(monkeypatch, tmp_path):
    assert machine.ensure_home() is None

    def none(*given):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", none)
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    said = machine.ensure_home()
    assert Path.home().parent == tmp_path and str(Path.home()) in said
    monkeypatch.delenv("USER")  # set by it, and not by monkeypatch
    monkeypatch.delenv("HOME")


def test_the_memory_of_a_process(monkeypatch):
    peak, now = machine.peak_memory_bytes(), psutil.Process().memory_info().rss
    monkeypatch.setitem(machine.sys.modules, "resource", None)
    assert 0.5 * now < machine.peak_memory_bytes() <= 1.1 * peak
