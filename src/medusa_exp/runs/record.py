"""The record of a run: `run.json` and `metrics.json`, merged by stage.

`run.json` says what the run was made of (code, machine, data, cache entries) and how each stage
ended; `metrics.json` has the numbers that the stages found.
"""

import logging
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from medusa_exp.config import Config, named_variables
from medusa_exp.config.privacy import shareable_text, without_users
from medusa_exp.errors import Stopped
from medusa_exp.runs.files import content_key, publish, read_json, sha256_file, write_json
from medusa_exp.runs.locks import locked
from medusa_exp.runs.machine import device_name, peak_memory_bytes

_LOCK = ".record.lock"
_KEYS = ".metrics.keys.json"
"""Of what metrics.json holds, and held before: a process may be killed between the two writes."""
log = logging.getLogger(__name__)
_PACKAGES = ("medusa-exp", "torch", "transformers", "lightning", "tokenizers", "wandb", "numpy")


class RunRecord:
    """The two record files of a run directory; an existing record is continued.

    Several calls may be at stages of one run at once: each writes its own, under a lock.

    `run` is the content of run.json and `metrics` that of metrics.json, as they were last written.
    """

    def __init__(self, out: Path, config: Config, command: list[str]) -> None:
        command = [without_users(word) for word in command]
        self.out, self.config, self.command = out, config, command
        self.metrics: dict[str, float] = read_json(out / "metrics.json", {})
        if content_key(self.metrics) not in read_json(out / _KEYS, [content_key(self.metrics)]):
            log.warning(
                "%s has other numbers than were written there: run the stages again that they are "
                "of, or restore it",
                out / "metrics.json",
            )
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
            with publish(out / "uncommitted.diff") as partial:
                partial.write_text(diff, encoding="utf-8")

    @contextmanager
    def stage(self, name: str) -> Iterator["Notes"]:
        """Time a stage and record how it ended, also when it fails or is interrupted.

        Yields:
            What the stage tells of itself; each note is in run.json at once.
        """
        # The top of run.json describes the newest call; each stage keeps what it was made by.
        entry: dict[str, Any] = {
            "status": "running",
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
            entry["status"] = "done"
        except BaseException as error:
            is_stopped = isinstance(error, KeyboardInterrupt | SystemExit | Stopped)
            entry["status"] = "interrupted" if is_stopped else "failed"
            entry["error"] = named_variables(f"{type(error).__name__}: {error}", self.out)
            raise
        finally:
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
        self._save()
        with self._locked():
            # Another call may have replaced its stages' numbers, and taken some away.
            self.metrics = read_json(self.out / "metrics.json", {})
            key_before = content_key(self.metrics)
            for name in before:
                self.metrics.pop(name, None)
            self.metrics.update(plain)
            write_json(self.out / _KEYS, [key_before, content_key(self.metrics)])
            write_json(self.out / "metrics.json", dict(sorted(self.metrics.items())))
        return plain

    def _save(self) -> None:
        self.run["device"] = device_name(self.config.device)
        self.run["peak_memory_bytes"] = peak_memory_bytes()
        with self._locked():
            # Another call may be at other stages of this run, and have written them meanwhile.
            written, stages = read_json(self.out / "run.json", {}), self.run["stages"]
            own = {name: stages[name] for name in stages if name in self._own}
            stages.update({**written.get("stages", {}), **own})
            for key in ("data", "cache_keys"):
                self.run[key].update({**written.get(key, {}), **self.run[key]})
            write_json(self.out / "run.json", self.run)

    def _locked(self) -> AbstractContextManager[None]:
        self.out.mkdir(parents=True, exist_ok=True)
        return locked(self.out / _LOCK)


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
    known = {"remote": shareable_text(remote)} if remote else {}
    return {"commit": commit.strip(), "dirty": bool(diff), **known}, diff


def _git(*arguments: str) -> str | None:
    call = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
