"""Locks where the file system has none."""

import errno

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
