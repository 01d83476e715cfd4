"""One flipped byte in a file of a run or of the cache: found, or without effect on any number."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import flip
from interrupted import dies_at
from safetensors.torch import load_file, save_file

from medusa_exp.data.examples import Examples, Table, Writer, open_examples
from medusa_exp.errors import UserError
from medusa_exp.model import load_heads
from medusa_exp.model.checkpoint import save_heads
from medusa_exp.model.heads import build_heads
from medusa_exp.runs import seals
from medusa_exp.runs.cache import entry
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.seals import damage, seal, verify
from medusa_exp.stages import train
from medusa_exp.stages.session import Session
from medusa_exp.train.checkpointing import _read


def _entry(root: Path, name: str = "key") -> Path:
    with entry(root, "kind", name) as (path, unwritten):
        if unwritten:
            unwritten.mkdir()
            (unwritten / "numbers").write_bytes(bytes(range(200)))
    return path


def test_each_flipped_byte_is_found(tmp_path):
    path = _entry(tmp_path)
    assert damage(path) is None
    for file in ("numbers", "sha256.json"):
        content = (path / file).read_bytes()
        for position in range(0, len(content), 3):
            flip(path / file, position)
            is_found = damage(path) is not None
            is_in_unread_end = (
                file == "sha256.json" and b"ends" in content[position - 80 : position]
            )
            assert is_found or is_in_unread_end or content[position : position + 1].isspace()
            (path / file).write_bytes(content)
    (path / "numbers").unlink()
    assert damage(path) == str(path / "numbers")


def test_a_damaged_entry_is_made_anew_with_a_line(tmp_path, caplog):
    path = _entry(tmp_path)
    flip(path / "numbers", 7)
    assert (_entry(tmp_path) / "numbers").read_bytes() == bytes(range(200))
    assert f"{path / 'numbers'} is damaged: {path} is made anew" in caplog.text
    caplog.clear()
    _entry(tmp_path)
    assert not caplog.text


def test_a_lone_file_is_sealed_too(tmp_path, caplog):
    def made() -> Path:
        with entry(tmp_path, "kind", "key.bin") as (path, unwritten):
            if unwritten:
                unwritten.write_bytes(b"numbers")
        return path

    flip(made(), 2)
    assert made().read_bytes() == b"numbers" and "is made anew" in caplog.text


def test_a_large_file_is_read_in_full_when_that_is_asked_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(seals, "_READ_WHOLE", 100)
    monkeypatch.setattr(seals, "_END", 50)
    paths = [_entry(tmp_path, name) for name in ("begins", "middle", "ends", "whole")]
    for path, position in zip(paths, (3, 100, 190), strict=False):
        flip(path / "numbers", position)
    assert [damage(path) is not None for path in paths] == [True, False, True, False]
    run = tmp_path / "run"
    shutil.copytree(paths[1], run / "backbone")
    with pytest.raises(UserError, match=r"backbone/numbers is not what .*delete .* train again"):
        verify(tmp_path / "none", run)
    shutil.rmtree(run)
    verify(tmp_path, run)
    assert [path.exists() for path in paths] == [False, False, False, True]
    assert caplog.text.count("is removed, and is made anew") == 3


def test_no_more_is_read_in_full_however_many_files_a_model_has(tmp_path, monkeypatch):
    """The shards of a large model are small ones: all together would take minutes."""
    monkeypatch.setattr(seals, "_READ_WHOLE", 250)
    monkeypatch.setattr(seals, "_END", 10)
    for number, size in enumerate((90, 50, 100, 200, 100)):
        (tmp_path / f"{number}").write_bytes(bytes(size))
    seal(tmp_path)
    found = []
    for number in range(5):
        flip(tmp_path / f"{number}", 25)
        found.append((damage(tmp_path) is not None, damage(tmp_path, is_thorough=True) is not None))
        flip(tmp_path / f"{number}", 25)
    assert found == [(True, True), (True, True), (True, True), (False, True), (False, True)]


def test_what_systems_put_into_folders_is_no_damage(tmp_path):
    names = (".DS_Store", "Thumbs.db", "desktop.ini", "._numbers", ".nfs0000001")
    for name in (*names, "numbers"):
        (tmp_path / name).write_bytes(b"x")
    seal(tmp_path)
    sealed = read_json(tmp_path / "sha256.json")["files"]
    assert set(sealed) == {"numbers"}
    older = {"files": dict.fromkeys((*names, "numbers"), sealed["numbers"])}
    write_json(tmp_path / "sha256.json", older)
    for name in names[:3]:
        (tmp_path / name).unlink()
    assert damage(tmp_path) is None


def test_what_has_no_seal_is_taken_as_it_is(tmp_path):
    path = _entry(tmp_path)
    (path / "sha256.json").unlink()
    flip(path / "numbers", 7)
    assert damage(path) is None and _entry(tmp_path) == path


def test_tokens_are_made_anew(config, tokenizer, tmp_path, caplog):
    session = Session(config, tmp_path / "run")

    def tokens() -> list[list[int]]:
        return [e.input_ids.tolist() for e in session.tokenized(tokenizer, 100).all()]

    whole = tokens()
    for file in (
        "documents/is_trained.npy",
        "documents/input_ids.starts.npy",
        "summary.json",
        "sha256.json",
    ):
        (path,) = (Path(config.cache_dir) / "tokenised").glob(f"*/{file}")
        for is_cut in (False, True):
            if not is_cut:
                flip(path, path.stat().st_size // 2)
            else:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            caplog.clear()
            assert tokens() == whole
            assert "is made anew" in caplog.text


def _unsealed(path: Path) -> Path:
    with Writer(path) as file:
        for _ in range(2):
            file.write(Table.of([(range(20), [1] * 20, "a", "b")] * 4))
    return path


def test_no_flipped_byte_of_tokens_without_a_seal_ends_the_process(tmp_path):
    """What is read by wrong lengths would be another row's, or no memory of this process."""
    path, rng = _unsealed(tmp_path / "documents"), random.Random(0)
    for file in sorted(path.iterdir()):
        content, refused = file.read_bytes(), 0
        for position in range(0, len(content), 7):
            file.write_bytes(content)
            flip(file, position, rng.randrange(8))
            try:
                examples = Examples(open_examples(path))
                assert [len(one.input_ids) for one in examples] == [20] * 8
                assert [len(one.is_trained) for one in examples] == [20] * 8
                examples.strings("conversation_id"), examples.strings("source")
            except UserError:
                refused += 1
        file.write_bytes(content)
        assert refused > (15 if ".starts" in file.name else 5), file


def test_tokens_that_are_cut_off_or_too_long_are_refused(tmp_path):
    path = _unsealed(tmp_path / "documents")
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for wrong in (
            *(content[:-n] for n in (1, 3, 8, 100)),
            content[:9],
            b"",
            content + b"\0" * 8,
        ):
            file.write_bytes(wrong)
            with pytest.raises(UserError, match="documents is not what was written there"):
                open_examples(path)
        file.unlink()
        with pytest.raises(UserError, match="documents is not what was written there"):
            open_examples(path)
        file.write_bytes(content)
    assert len(open_examples(path)) == 8


def test_heads_are_refused(backbone, tmp_path):
    place = tmp_path / "heads"
    save_heads(build_heads(backbone, num_heads=1), place)
    load_heads(place, backbone)
    for file in sorted(place.iterdir()):
        content = file.read_bytes()
        for position in (len(content) // 3, len(content) // 2, len(content) - 4):
            flip(file, position)
            with pytest.raises(UserError, match="heads/"):
                load_heads(place, backbone)
            file.write_bytes(content)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "integers"])
def test_heads_without_finite_weights_are_refused(backbone, tmp_path, value):
    place = tmp_path / "heads"
    save_heads(build_heads(backbone, num_heads=1), place)
    weights = load_file(place / "model.safetensors")
    first = min(weights)
    if value == "integers":
        weights[first] = weights[first].to(torch.int32)
    else:
        weights[first].view(-1)[0] = value
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    seal(place)
    with pytest.raises(UserError, match=f"the weights {first} are integers, or not all"):
        load_heads(place, backbone)


def test_a_checkpoint_that_was_replaced_is_neither_kept_nor_believed(tmp_path):
    parts = {key: {} for key in ("state_dict", "loops", "callbacks")}
    parts |= {"optimizer_states": [], "lr_schedulers": [], "made_with": "a"}
    parts |= {"random_state": {"python": 1, "numpy": 1, "torch": torch.zeros(9)}}
    path, new = tmp_path / "last.ckpt", tmp_path / "next.ckpt"
    for step, file in enumerate((path, new), 1):
        torch.save({**parts, "global_step": step}, file)
        os.utime(file, ns=(10**18, 10**18))
    assert path.stat().st_size == new.stat().st_size
    assert _read(path).global_step == 1
    if (maps := Path("/proc/self/maps")).exists():
        assert path.name not in maps.read_text()
    new.replace(path)
    assert _read(path).global_step == 2


def test_a_training_does_not_go_on_from_what_is_damaged(config, tmp_path):
    config.decode.max_new_tokens = 16
    out = tmp_path / "run"
    out.mkdir()
    with dies_at(9):
        train.run(config, out)
    last, (best,) = out / "checkpoints/last.ckpt", (out / "checkpoints").glob("best-*")
    for file in (last, best):
        content = file.read_bytes()
        flip(file, len(content) // 2)
        with pytest.raises(UserError, match=f"{file.name} is (missing or )?damaged"):
            train.run(config, out)
        file.write_bytes(content)
    good = torch.load(last, weights_only=True)
    for key in ("optimizer_states", "global_step", "random_state", "callbacks"):
        torch.save({name: value for name, value in good.items() if name != key}, last)
        with pytest.raises(UserError, match=rf"last\.ckpt is damaged .*`{key}`.*set train.resume"):
            _read(last)
    for wrong in ([], {"made_with": 1}, {**good, "global_step": "x"}, {**good, "loops": []}):
        torch.save(wrong, last)
        with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
            _read(last)
    last.write_bytes(b"")
    with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
        train.run(config, out)


def test_what_another_process_is_writing_is_not_sealed(tmp_path):
    """It will have another name, or none, when it is looked for."""
    (tmp_path / "config.yaml").write_text("a: 1")
    (tmp_path / f".{seals.SEAL}.partial-7da8057e-623-2659695f").write_text("{")
    seals.seal(tmp_path)
    assert [*read_json(tmp_path / seals.SEAL, {})["files"]] == ["config.yaml"]
