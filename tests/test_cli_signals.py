"""The command line that a signal ends: its status, and what it says of how to go on."""

import signal
import subprocess
import sys

import pytest

from medusa_exp import cli
from medusa_exp.runs.files import write_json


@pytest.fixture
def exit_status_of(monkeypatch):
    """Runs `main` with some work in the place of Hydra's; returns its exit status."""
    changed = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in changed}
    monkeypatch.setattr(sys, "argv", ["medusa_exp"])
    monkeypatch.setattr(cli.atexit, "register", lambda *given: None)
    monkeypatch.setattr(cli, "_report_in_our_words", lambda: None)

    def status(work) -> object:
        monkeypatch.setattr(cli, "_hydra_main", work)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
            cli.main()
        return getattr(ended.value, "code", "a traceback")

    yield status
    for number, handler in handlers.items():
        signal.signal(number, handler)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("is_interrupted", "status"), [(True, 130), (False, 1)])
def test_the_end_that_lightning_makes_of_ctrl_c_is_told_by_the_status(
    exit_status_of, is_interrupted, status
):
    """Lightning turns Ctrl-C into exit(1), which says that something has failed."""

    def end():
        try:
            if is_interrupted:
                interrupt()
        except KeyboardInterrupt:
            sys.exit(1)
        sys.exit(1)

    assert exit_status_of(end) == status


def test_ctrl_c_once_more_while_the_jobs_of_a_sweep_are_printed_is_told_as_the_first(
    exit_status_of, monkeypatch
):
    monkeypatch.setattr(cli.sweep, "started", interrupt)
    assert exit_status_of(interrupt) == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_libraries_load_ends_all_at_once(tmp_path, number):
    """An exception there makes C++ code abort, and was once told as a mistyped key."""
    early = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # in the background: ignored
        "from medusa_exp import cli\n"
        "def loading():\n"
        f"    try: os.kill(os.getpid(), {int(number)}); sum(range(10**6))\n"
        "    finally: print('not at once')\n"
        "cli._hydra_main = loading\n"
        "sys.argv = ['medusa_exp']\n"
        "print('begun', end=' ')\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", early], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "begun ", "")
    later = early.replace("def loading():\n", "def loading():\n    cli._begin()\n")
    done = subprocess.run(
        [sys.executable, "-c", later], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout) == (128 + number, "begun not at once\n")


@pytest.mark.parametrize(
    ("end", "now", "said", "left"),
    [
        (
            KeyboardInterrupt(),
            {"train": "done", "calibrate": "interrupted"},
            "by SIGINT in stage calibrate. This goes on there",
            "calibrate,evaluate",
        ),
        (
            SystemExit(128 + signal.SIGTERM),
            {"train": "done"},
            "by SIGTERM in stage calibrate.",
            "calibrate,evaluate",
        ),
        (
            KeyboardInterrupt(),
            {},
            "by SIGINT before its first stage: give the same command again.",
            None,
        ),
        (
            KeyboardInterrupt(),
            {"train": "done", "calibrate": "done", "evaluate": "done"},
            "by SIGINT after its last stage.",
            None,
        ),
        (SystemExit(1), {"train": "failed"}, None, None),
    ],
)
def test_a_run_that_a_signal_ends_says_where_it_goes_on(tmp_path, capsys, end, now, said, left):
    out = tmp_path / "a run"
    entries = {"evaluate": {"status": "interrupted", "began": "by an earlier call"}}
    write_json(out / "run.json", {"stages": entries})
    stages = ["train", "calibrate", "evaluate"]
    given = ["run_dir=x", "stages=[y]", "evaluate.num_prompts=9"]

    def run_until_the_end():
        entries.update({name: {"status": status, "began": "now"} for name, status in now.items()})
        write_json(out / "run.json", {"stages": entries})
        raise end

    with pytest.raises(type(end)), cli._told_how_to_go_on(stages, out, given):
        run_until_the_end()
    found = capsys.readouterr().err
    if said is None:
        assert found == ""
        return
    assert said in found
    if left is not None:  # with what this call has changed, which is not saved with the run
        command = f"'stages=[{left}]' 'run_dir={out}' evaluate.num_prompts=9\n"
        assert found.endswith(f"python -m medusa_exp {command}")


def test_a_signal_that_comes_when_all_is_done_shows_no_traceback(tmp_path):
    """Libraries tidy up at the end: an exit in the middle of that is told as an error of theirs."""
    late = (
        "import atexit, os, signal, sys\n"
        "atexit.register(lambda: [os.kill(os.getpid(), number) for number in (2, 15)])\n"
        "from medusa_exp import cli\n"
        "cli._hydra_main = lambda: None\n"
        "sys.argv = ['medusa_exp']\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", late], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
