"""Lost power: contents are on the disk before names are, and a training goes on from what is left.

Whole runs, cut at every moment: `tests/slow/test_power_cut.py`.
"""

from pathlib import Path

import pytest
from power_cut import PowerCuts, Tree, restore

from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json, read_jsonl, write_json
from medusa_exp.runs.record import RunRecord
from medusa_exp.runs.seals import check_config, seal_config
from medusa_exp.stages import train
from medusa_exp.stages.session import Session


def _train(config, place: Path) -> dict[str, float]:
    config.cache_dir, out = str(place / "cache"), place / "run"
    out.mkdir(parents=True, exist_ok=True)
    record = RunRecord(out, config, [])
    session = Session(config, out)
    with record.stage("train") as session.notes:
        metrics = train.run(config, out, session)
    return record.merge_metrics("train", metrics)


def _kept(tree: Tree) -> Tree:
    """Return the files under final names; a file that lines are added to may end earlier."""
    names = [name for name in tree if ".partial-" not in name and not name.endswith(".lock")]
    return {name: tree[name] for name in names}


def _heads(place: Path) -> bytes:
    return (place / "run/heads/model.safetensors").read_bytes()


def test_a_training_goes_on_from_what_lost_power_leaves(config, tmp_path):
    config.decode.max_new_tokens = 16
    with PowerCuts(tmp_path / "whole") as cuts:
        wanted = _train(config, tmp_path / "whole")
        whole = cuts.whole()
        assert _kept(cuts.now()) == _kept(whole)
    assert len(cuts.trees) > 20
    for tree in cuts.trees:
        kept = _kept(tree)
        assert not [name for name in kept if not kept[name] and "history.jsonl" not in name]
    place = tmp_path / "again"
    restore(next(tree for tree in cuts.trees if "run/checkpoints/last.ckpt" in tree), place)
    found = _train(config, place)
    for name in ("train/loss", "val/accept_length"):
        assert found[name] == wanted[name]
    assert _heads(place) == whole["run/heads/model.safetensors"]
    steps = [
        {line["step"] for line in read_jsonl(out / "run/history.jsonl")}
        for out in (place, tmp_path / "whole")
    ]
    assert steps[0] == steps[1]


def test_a_file_that_lost_power_emptied_counts_as_missing(tmp_path, caplog):
    (tmp_path / "run.json").write_bytes(b"")
    (tmp_path / "history.jsonl").write_bytes(b"\0" * 4096)
    assert (
        read_json(tmp_path / "run.json", {}) == {} and read_jsonl(tmp_path / "history.jsonl") == []
    )
    assert caplog.text.count("is empty, as lost power leaves files: it counts as missing") == 2


def test_a_config_is_on_the_disk_before_there_is_a_run(tmp_path):
    with PowerCuts(tmp_path) as cuts:
        (tmp_path / ".hydra").mkdir()
        (tmp_path / ".hydra" / "config.yaml").write_text("seed: 1\n")
        assert cuts.now() == {".hydra/config.yaml": b""}
        seal_config(tmp_path / ".hydra")
        write_json(tmp_path / "run.json", {})
        assert cuts.now()[".hydra/config.yaml"] == b"seed: 1\n"
    check_config(tmp_path)
    (tmp_path / ".hydra" / "config.yaml").write_text("seed: 2\n")
    with pytest.raises(UserError, match=r"config\.yaml is not what was written .*delete .*sha256"):
        check_config(tmp_path)
