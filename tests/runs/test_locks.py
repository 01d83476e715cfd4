"""Locks where the file system has none."""

import errno
import os
import re
import sys
import threading
import time

import pytest
from filelock import FileLock, Timeout

from medusa_exp.runs import locks


@pytest.mark.parametrize("number", [None, errno.ENOLCK, errno.EOPNOTSUPP])
def test_one_at_a_time(monkeypatch, tmp_path, caplog, number):
    if number is not None:

        def refused(lock):
            raise OSError(number, "No locks available")

        monkeypatch.setattr(FileLock, "_acquire", refused)
    path = tmp_path / ".lock"
    with locks.locked(path), pytest.raises(Timeout), locks.locked(path, timeout=0):
        pass
    with locks.locked(path, timeout=0):
        pass
    assert ("has no locks" in caplog.text) == (number is not None)


def test_other_errors_are_not_hidden(monkeypatch, tmp_path):
    def refused(lock):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FileLock, "_acquire", refused)
    with pytest.raises(OSError, match="Input/output"), locks.locked(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("is_soft", [False, True])
def test_who_waits_says_for_what_and_for_whom(monkeypatch, tmp_path, caplog, is_soft):
    def refused(lock):
        raise OSError(errno.ENOLCK, "No locks available")

    if is_soft:
        monkeypatch.setattr(FileLock, "_acquire", refused)
    monkeypatch.setattr(locks, "_QUIET", 0.1)
    monkeypatch.setattr(locks, "_BETWEEN_LINES", 0.1)
    path, has_waited = tmp_path / ".lock", []

    def wait(what):
        with locks.locked(path, what=what):
            has_waited.append(what)

    waiting = [threading.Thread(target=wait, args=(what,)) for what in ("the entry", None)]
    with locks.locked(path):
        for thread in waiting:
            thread.start()
        time.sleep(0.5)
        assert not has_waited
        # Of those behind them, one may look just when the lock goes from one to the other.
        lines = [line for line in caplog.messages if line.startswith("waiting for")]
    for thread in waiting:
        thread.join(10)
    assert 2 <= len(lines) < 10 and {*map(type, has_waited)} == {str, type(None)}
    for line in lines:
        assert re.match(r"waiting for the entry \(\d s\): ", line) and str(path) in line
        assert f"process {os.getpid()} " in line or not (is_soft or sys.platform == "linux")
