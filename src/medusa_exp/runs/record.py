"""The record of a run: `run.json` and `metrics.json`, merged by stage.

`run.json` says what the run was made of (code, machine, data, cache entries) and how each stage
ended; `metrics.json` has the numbers that the stages found. That their bytes are those that were
written is checked when a call opens them: run.json has a checksum of itself, the sha256 of
metrics.json, and that of the files from which a stage that is done draws its numbers.
"""

import hashlib
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import Timeout

from medusa_exp.config import Config, named_variables
from medusa_exp.config.privacy import bare_remote, without_secrets
from medusa_exp.errors import Stopped, UserError
from medusa_exp.runs.files import (
    json_text,
    read_json,
    remove,
    sha256_file,
    sync,
    write_json,
    write_text,
)
from medusa_exp.runs.locks import locked
from medusa_exp.runs.machine import device_name, peak_memory_bytes
from medusa_exp.runs.processes import this_process

FAILURE = "failure.json"
"""Why no stage of a run began. Once there is a run.json, failures stand there."""
_LOCK = ".record.lock"
_OF_REFUSED = {".hydra", "medusa_exp.log"}
"""What Hydra makes in the directory of a run before its config is checked."""
_LEFT_BY = {
    "inspect": ["data_samples.jsonl"],
    "calibrate": ["calibration.json"],
    "evaluate": ["records.jsonl", "samples.jsonl", "serving.json", "serving.jsonl"],
}
"""Files that a stage alone writes, each at its end: of two calls at once, one would spoil them."""
_HISTORY, _ADD_LINES = "history.jsonl", ("pretrain", "train")
log = logging.getLogger(__name__)
_PACKAGES = ("medusa-exp", "torch", "transformers", "lightning", "tokenizers", "wandb", "numpy")


class RunRecord:
    """The two record files of a run directory; an existing record is continued.

    Several calls may be at stages of one run at once: each writes its own, under a lock.

    `run` is the content of run.json and `metrics` that of metrics.json, as they were last written.
    """

    def __init__(self, out: Path, config: Config, command: list[str]) -> None:
        command = [without_secrets(word) for word in command]
        self.out, self.config, self.command = out, config, command
        check_record(out, but=config.stages)
        self.metrics: dict[str, float] = read_json(out / "metrics.json", {})
        self.run: dict[str, Any] = {
            "name": config.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **{"stages": {}, "data": {}, "cache_keys": {}, "command": command},
            **read_json(out / "run.json", {}),
        }
        self._metric_names: dict[str, list[str]] = {
            name: entry.get("metrics", []) for name, entry in self.run["stages"].items()
        }
        self._own: set[str] = set()
        self.run["seed"] = config.seed
        self.run["versions"] = {"python": platform.python_version(), **versions(_PACKAGES)}
        self.run["git"], diff = checkout()
        if diff:
            write_text(out / "uncommitted.diff", diff)

    @contextmanager
    def stage(self, name: str) -> Iterator["Notes"]:
        """Time a stage and record how it ended, also when it fails or is interrupted.

        Yields:
            What the stage tells of itself; each note is in run.json at once.

        Raises:
            UserError: another call is at a stage of this name, whose files both would write.
        """
        # Of two at once, one would decode over the tree that the other chose, and each would time
        # its steps beside the other's. Stage train has a lock of its own, for its workers too.
        with _refusing_second(self.out, name) if name in _LEFT_BY else nullcontext():
            yield from self._stage(name)

    def _stage(self, name: str) -> Iterator["Notes"]:
        # The top of run.json describes the newest call; each stage keeps what it was made by.
        entry: dict[str, Any] = {
            "status": "running",
            "began": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "process": this_process(),  # as long as it runs: a killed one leaves it
            "command": self.command,
            **{key: self.run[key] for key in ("seed", "git", "versions")},
        }
        if name in self._metric_names:  # these are there until others replace them
            entry["metrics"] = self._metric_names[name]
        self.run["stages"][name] = entry
        self._own.add(name)
        self._save()
        start = time.perf_counter()
        notes = Notes(self.run, entry, self._save)
        try:
            yield notes
            sync(self.out / _HISTORY)
            entry["files"] = _digests(self.out, _LEFT_BY.get(name, []))
            if name in _ADD_LINES and (lines := _lines_of(self.out)):
                entry["history"] = lines
            entry["status"] = "done"
        except BaseException as error:
            entry |= how_it_ended(error, self.out)
            raise
        finally:
            del entry["process"]
            entry["seconds"] = round(time.perf_counter() - start, 2)
            entry["peak_memory_bytes"] = peak_memory_bytes()
            self._save()

    def merge_metrics(self, stage: str, metrics: dict[str, float]) -> dict[str, float]:
        """Put a stage's metrics into `metrics.json` in place of those of its last time.

        Returns:
            What was written: as floats, without those that are not finite.
        """
        plain = {name: float(value) for name, value in metrics.items()}
        if broken := sorted(name for name, value in plain.items() if not math.isfinite(value)):
            log.warning("stage %s: not finite, and left out: %s", stage, ", ".join(broken))
            plain = {name: value for name, value in plain.items() if name not in broken}
        entry, before = self.run["stages"].setdefault(stage, {}), self._metric_names.get(stage, [])
        entry["metrics"] = self._metric_names[stage] = sorted(plain)
        self._own.add(stage)
        path = self.out / "metrics.json"
        with self._locked():
            # Another call may have replaced its stages' numbers, and taken some away.
            self.metrics = read_json(path, {})
            for name in before:
                self.metrics.pop(name, None)
            self.metrics.update(plain)
            text = json_text(dict(sorted(self.metrics.items())))
            # Both, since a call that is killed between the two leaves the old ones.
            allowed = [*_digests(self.out, [path.name]).values(), _sha256(text)]
            self._write(metrics_sha256=allowed)
            write_text(path, text)
        return plain

    def _save(self) -> None:
        with self._locked():
            self._write()

    def _write(self, **values: Any) -> None:
        """Write run.json; to be called under the lock."""
        self.run["device"] = device_name(self.config.device)
        self.run["peak_memory_bytes"] = peak_memory_bytes()
        # Another call may be at other stages of this run, and have written them meanwhile.
        written, stages = read_json(self.out / "run.json", {}), self.run["stages"]
        own = {name: stages[name] for name in stages if name in self._own}
        stages.update({**written.get("stages", {}), **own})
        for key in ("data", "cache_keys"):
            self.run[key].update({**written.get(key, {}), **self.run[key]})
        if "metrics_sha256" in written:
            self.run["metrics_sha256"] = written["metrics_sha256"]
        self.run.update(values)
        write_json(self.out / "run.json", self.run)

    def _locked(self) -> AbstractContextManager[None]:
        self.out.mkdir(parents=True, exist_ok=True)
        return locked(self.out / _LOCK)


@contextmanager
def _refusing_second(out: Path, stage: str) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(out / f".{stage}.lock", timeout=0))
        except Timeout as error:
            raise UserError(
                f"another process is at stage {stage} in {out}: wait for it, or choose another "
                "run_dir."
            ) from error
        yield


@contextmanager
def noted_failure(out: Path) -> Iterator[None]:
    """Note in the run what fails within this block, which comes before its record."""
    (out / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        # Whatever else is wrong, such as a disk that is full, is not to hide it.
        with suppress(Exception):
            if not (isinstance(error, Stopped) or (out / "run.json").exists()):
                write_json(out / FAILURE, {"error": how_it_ended(error, out)["error"]})
        raise


def how_it_ended(error: BaseException, out: Path) -> dict[str, str]:
    """Return the status of what an error has ended in a run, and that error in words."""
    is_stopped = isinstance(error, KeyboardInterrupt | SystemExit | Stopped)
    said = named_variables(f"{type(error).__name__}: {error}", out)
    return {"status": "interrupted" if is_stopped else "failed", "error": said}


def drop_refused(out: Path) -> None:
    """Remove the directory of a run whose config was refused, if it has only Hydra's files."""
    if {path.name for path in out.iterdir()} <= _OF_REFUSED:
        remove(out)


def check_record(out: Path, but: Collection[str] = ()) -> None:
    """Check that the numbers of a run are those that were written, as far as its record tells.

    Args:
        out: its directory.
        but: stages whose files are about to be written anew.

    Raises:
        UserError: a file is damaged, or was changed; says what to do.
    """
    is_writable = out.is_dir() and os.access(out, os.W_OK)  # else nobody here changes it
    with locked(out / _LOCK) if is_writable else nullcontext():
        run = read_json(out / "run.json", {})
        read_json(out / "metrics.json")  # looked at before it is read to its end
        allowed, found = run.get("metrics_sha256", []), _digests(out, ["metrics.json"])
    if allowed and not set(found.values()) <= set(allowed):
        raise _damaged(
            out / "metrics.json", "delete the keys `metrics_sha256` and `check` of run.json"
        )
    for stage, entry in run.get("stages", {}).items():
        if stage in but or entry.get("status") != "done":
            continue
        for name, digest in entry.get("files", {}).items():
            if _digests(out, [name]).get(name, digest) != digest:
                raise _damaged(out / name, f"run stage {stage} again")
        if (lines := entry.get("history")) and _lines_of(out, lines["bytes"]) not in (None, lines):
            raise _damaged(out / _HISTORY, f"run stage {stage} again")


def _damaged(path: Path, otherwise: str) -> UserError:
    return UserError(
        f"{path} is not what was written there: restore it. If it was changed on purpose, or is "
        f"not to be had any more, {otherwise}."
    )


def _digests(out: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of those files that are there."""
    return {name: sha256_file(out / name) for name in names if (out / name).is_file()}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _lines_of(out: Path, size: int | None = None) -> dict[str, Any] | None:
    """Return size and sha256 of what history.jsonl begins with: so many bytes, or all whole lines.

    It is only added to. None where there is none.
    """
    if not (path := out / _HISTORY).is_file():
        return None
    content = path.read_bytes()
    content = content[: content.rfind(b"\n") + 1 if size is None else size]
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


class Notes:
    """What a stage tells of itself while it runs: into a run's record, or kept for another process.

    `run` has what concerns the whole run (`cache_keys`, `data`), `entry` what the stage is alone.
    """

    def __init__(
        self,
        run: dict[str, Any] | None = None,
        entry: dict[str, Any] | None = None,
        save: Callable[[], None] = lambda: None,
    ) -> None:
        self.run = {"cache_keys": {}, "data": {}} if run is None else run
        self.entry = {} if entry is None else entry
        self._save = save

    def add(self, **values: Any) -> None:
        """Add to the stage's entry."""
        self.entry.update(values)
        self._save()

    def add_inputs(self, files: Iterable[Path] = (), **cache_keys: str) -> None:
        """Add the hashes of data files that the stage reads, and the cache entries that it uses."""
        self.run["data"].update({str(path): sha256_file(path) for path in files})
        self.run["cache_keys"].update(cache_keys)
        self._save()

    def to_dict(self) -> dict[str, Any]:
        """Return all notes, for `merge` in another process."""
        return {"entry": self.entry, **{key: self.run[key] for key in ("cache_keys", "data")}}

    def merge(self, found: dict[str, Any]) -> None:
        """Add what `to_dict` gave elsewhere."""
        self.entry.update(found["entry"])
        for key in ("cache_keys", "data"):
            self.run[key].update(found[key])
        self._save()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def checkout() -> tuple[dict[str, Any], str]:
    """Return commit, remote and whether anything is uncommitted, of the checkout that this package
    runs from; and the diff of what is. The commit is None where there is no checkout."""
    # An installed package may lie inside somebody else's checkout: only a tracked file is ours.
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", __file__) else None
    if commit is None:
        return {"commit": None, "dirty": False}, ""
    remote = (_git("remote", "get-url", "origin") or "").strip()
    diff = _git("diff", "HEAD") or ""
    known = {"remote": bare_remote(remote)} if remote else {}
    return {"commit": commit.strip(), "dirty": bool(diff), **known}, diff


def _git(*arguments: str) -> str | None:
    call = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
