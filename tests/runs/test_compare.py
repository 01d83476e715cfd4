"""The numbers of a run and of the same one done again, side by side."""

import pytest

from medusa_exp.runs.compare import compare, compare_with_source, main, print_comparison
from medusa_exp.runs.files import read_json, write_json


@pytest.mark.parametrize(
    ("old", "new", "said", "differing", "only_one_has"),
    [
        ({"a": 1.0}, {"a": 1.0}, "equal in every metric that does not depend on timing", [], []),
        ({"a": 1.0}, {"a": 2.0}, "different, and not because of timing: a", ["a"], []),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, "only one of them has: 1", [], ["b"]),
        ({"a": 1.0}, {"b": 1.0}, "share no metric that can be compared", [], ["a", "b"]),
        ({}, {}, "share no metric that can be compared", [], []),
        ({"eval/speedup": 1.0}, {"eval/speedup": 2.0}, "share no metric", [], []),
    ],
)
def test_what_is_said_of_two_runs(tmp_path, capsys, old, new, said, differing, only_one_has):
    for name, metrics in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "metrics.json", metrics)
    found = compare(tmp_path / "old", tmp_path / "new")
    assert (found["differing"], found["only_one_has"]) == (differing, only_one_has)
    assert not (tmp_path / "new" / "rerun.json").exists()
    main([str(tmp_path / "old"), str(tmp_path / "new")])
    printed = capsys.readouterr().out
    assert said in " ".join(printed.split())
    compare_with_source(str(tmp_path / "old"), tmp_path / "new")
    assert read_json(tmp_path / "new" / "rerun.json") == found
    which = f"then: {tmp_path / 'old'}\nnow: {tmp_path / 'new'}\n"
    assert which + capsys.readouterr().out == printed


def test_settings_that_differ_are_named(tmp_path, capsys):
    for name, settings in {
        "old": "run_dir: a\nhead: {kind: medusa, rank: null}\ntrain: {lr: 1, gone: 2, few: []}",
        "new": "run_dir: b\nhead: {kind: hydra, rank: 4}\ntrain: {lr: 1, few: [1]}",
    }.items():
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra/config.yaml").write_text(
            f"{settings}\nmodel: {{path: '${{x}}'}}"
        )
    found = compare(tmp_path / "old", tmp_path / "new")
    differing = {"head.kind": ["medusa", "hydra"], "head.rank": [None, 4], "train.few": [[], [1]]}
    assert found["settings"] == differing
    print_comparison(found)
    assert "set otherwise: head.kind: medusa then, hydra now\n" in capsys.readouterr().out
    many = {f"a{n}": [n, n + 1] for n in range(33)}
    print_comparison({**found, "settings": many})
    printed = capsys.readouterr().out
    assert "a29: 29 then" in printed and "a30:" not in printed and "3 more keys" in printed


def test_what_is_no_run_directory_is_said(tmp_path):
    with pytest.raises(SystemExit, match=r"is no run directory: it has no metrics\.json"):
        main([str(tmp_path), str(tmp_path)])
    with pytest.raises(SystemExit, match="give two run directories"):
        main([str(tmp_path)])


def test_a_table_in_a_pipe_has_one_line_a_metric(tmp_path, capsys):
    name = f"eval/category/{'long' * 20}/tokens_per_step"
    for run in ("old", "new"):
        (tmp_path / run).mkdir()
        write_json(tmp_path / run / "metrics.json", {name: 1.5})
    print_comparison(compare(tmp_path / "old", tmp_path / "new"))
    [line] = [line for line in capsys.readouterr().out.splitlines() if name in line]
    assert line.count("1.5") == 2 and "equal" in line


def test_later_calls_of_the_old_run_are_told(tmp_path, capsys):
    for name in ("old/.hydra-2", "new"):
        (tmp_path / name).mkdir(parents=True)
    print_comparison(compare(tmp_path / "old", tmp_path / "new"))
    assert "was called again later (.hydra-2), and its numbers" in capsys.readouterr().out


def test_another_calibrated_tree_is_named_as_a_cause(tmp_path, capsys):
    for name, parents in (("old", [-1, 0]), ("new", [-1, 0, 1])):
        (tmp_path / name).mkdir()
        write_json(
            tmp_path / name / "tree.json", {"parents": parents, "ranks": [-1, 0, 0][: len(parents)]}
        )
        metrics = {"eval/num_nodes": len(parents), "eval/tokens_per_step": 1 + len(parents) / 10}
        write_json(tmp_path / name / "metrics.json", metrics)
    found = compare(tmp_path / "old", tmp_path / "new")
    assert found["differing"] == ["eval/tokens_per_step"]
    print_comparison(found)
    assert "decoded over another tree than then" in capsys.readouterr().out


def test_keys_of_the_same_data_in_another_format_are_no_difference(tmp_path):
    for name, key, data in (("old", "0c5e", {}), ("new", "91af", {"format": 1})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "data.json", data)
        keys = {"dataset": key, "tokenised": key, "regenerated": key}
        write_json(tmp_path / name / "run.json", {"data": {"a": "7d"}, "cache_keys": keys})
    found = compare(tmp_path / "old", tmp_path / "new")
    assert found["provenance"] == {}
    write_json(tmp_path / "old" / "data.json", {"format": 1})
    assert set(compare(tmp_path / "old", tmp_path / "new")["provenance"]) == set(keys)
