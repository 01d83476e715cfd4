"""Processes that files name."""

from medusa_exp.runs import processes


def test_another_machine_of_the_same_name_is_another_one(tmp_path, monkeypatch):
    """Hosts named `localhost` on one file system: their processes are none of ours."""
    names = set()
    for boot in "ab":
        (tmp_path / boot).write_text(boot)
        monkeypatch.setattr(processes, "_NAMES_OF_MACHINE", [tmp_path / boot])
        processes._machine.cache_clear()
        names.add(processes._machine())
    monkeypatch.undo()
    processes._machine.cache_clear()
    assert len({*names, processes._machine()}) == 3
