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


def test_a_container_whose_hardware_has_no_number_has_one_name(tmp_path, monkeypatch):
    """There `uuid.getnode` draws one in each process: images have no tools, and no machine-id."""
    (tmp_path / "boot_id").write_text("b")
    monkeypatch.setattr(processes, "_NAMES_OF_MACHINE", [tmp_path / "none", tmp_path / "boot_id"])
    names = set()
    for drawn in (1, 2):
        monkeypatch.setattr(processes.uuid, "getnode", lambda drawn=drawn: drawn)
        processes._machine.cache_clear()
        names.add(processes._machine())
    processes._machine.cache_clear()
    assert len(names) == 1
