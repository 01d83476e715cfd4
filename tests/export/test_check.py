"""The linter names each planted fault, and finds none in what is right."""

import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from exported import FAMILIES, exported
from safetensors.torch import load_file, save_file
from tiny_models import build_model

from medusa_exp.errors import UserError
from medusa_exp.export import check as linter
from medusa_exp.export.check import check, first_choices, main
from medusa_exp.export.faults import all_faults
from medusa_exp.export.formats import FORMATS
from medusa_exp.export.importing import import_heads
from medusa_exp.export.publishing import export, open_source
from medusa_exp.export.reading import read_heads
from medusa_exp.model import Backbone, build_heads, load_heads, save_heads
from medusa_exp.model.convert import convert_file
from medusa_exp.model.convert import main as convert_main
from medusa_exp.model.heads import heads_input
from medusa_exp.model.scoring import answer_ranks


@pytest.fixture
def native(backbone, tmp_path):
    """Heads in vLLM's own format, as (directory, edit): edit changes config and tensors."""
    exported(backbone, "medusa", "vllm_medusa", tmp_path)
    return tmp_path / "vllm_medusa"


def edit(place, of_config=None, of_tensors=None, without=()):
    """Change what stands in a directory: keys of the config, tensors by name."""
    file, path = place / "config.json", next(place.glob("*.safetensors"))
    config = {**json.loads(file.read_text()), **(of_config or {})}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    tensors = load_file(path)
    kept = {name: t for name, t in tensors.items() if not any(part in name for part in without)}
    changed = {**kept, **(of_tensors(kept) if of_tensors else {})}
    save_file({name: tensor.clone().contiguous() for name, tensor in changed.items()}, path)


def names(place, **options):
    return {fault.name for fault in check(str(place), **options)[1] if fault.is_error}


def test_bias_dropped(native):
    edit(native, {"medusa_fc_bias": None})
    assert "bias dropped" in names(native)  # vLLM would pass over them: nothing else tells
    edit(native, {"medusa_fc_bias": True}, without=["bias"])
    assert "bias dropped" in names(native)


def test_projections_missing(native):
    edit(native, without=["lm_heads"])
    assert "projections missing" in names(native)


def test_one_projection_missing(native):
    edit(native, without=["lm_heads.1"])
    assert "projections missing" in names(native)


def test_heads_swapped(native):
    def swapped(tensors):
        number = {"0": "1", "1": "0", "2": "2"}
        return {
            re.sub(r"(?<=blocks\.|_heads\.)\d", lambda found: number[found[0]], name): tensor
            for name, tensor in tensors.items()
        }

    edit(native, of_tensors=swapped)
    _, faults = check(str(native))
    assert [fault.name for fault in faults] == ["heads swapped"] * 2
    assert faults[0].text == "head 1 is what was exported as head 2"


@pytest.mark.parametrize("number", [2, 4])
def test_wrong_head_count(native, number):
    edit(native, {"num_heads": number})
    assert names(native) == {"wrong head count"}


def test_a_key_that_vllm_takes_for_the_head_count(native):
    edit(native, {"num_attention_heads": 4})
    assert names(native) == {"wrong head count"}


def test_transposed(native):
    edit(native, of_tensors=lambda t: {"blocks.1.layers.0.weight": t["blocks.1.layers.0.weight"].T})
    _, faults = check(str(native))
    assert [(f.name, f.text) for f in faults] == [
        ("transposed", "the blocks of head 2 are transposed")
    ]


def test_a_transposed_projection_is_seen_by_its_shape(native):
    edit(native, {"medusa_heads_sha256": None}, lambda t: {"lm_heads.0.weight": torch.ones(32, 64)})
    assert "transposed" in names(native)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bfloat16])
def test_wrong_dtype(native, dtype):
    edit(native, of_tensors=lambda t: {"lm_heads.1.weight": t["lm_heads.1.weight"].to(dtype)})
    assert "wrong dtype" in names(native)


@pytest.mark.parametrize("how", ["rows", "config", "unused map"])
def test_truncated_vocabulary(native, how):
    if how == "config":
        edit(native, {"truncated_vocab_size": 40})
    elif how == "rows":
        edit(native, None, lambda t: {n: w[:40] for n, w in t.items() if "lm_heads" in n})
    else:
        edit(native, None, lambda t: {"token_map": torch.arange(64)})
    assert "truncated vocabulary" in names(native)


def test_truncated_vocabulary_of_our_own(backbone, tmp_path):
    exported(backbone, "frequent", "vllm", tmp_path)
    assert names(tmp_path / "vllm") == set()
    edit(tmp_path / "vllm", without=["token_map"])
    assert "truncated vocabulary" in names(tmp_path / "vllm")


def test_tied_without_matrix(backbone, tmp_path):
    exported(backbone, "tied", "vllm_medusa", tmp_path)
    assert names(tmp_path / "vllm_medusa") == set()
    edit(tmp_path / "vllm_medusa", without=["lm_head"])
    assert names(tmp_path / "vllm_medusa") == {"tied without matrix"}


def test_stray_tensors(native):
    edit(native, None, lambda t: {"blocks.0.gate": torch.ones(2)})
    assert names(native) == {"stray tensors"}


def test_shards_missing(native):
    (native / "model.safetensors").rename(native / "model-00001-of-00002.safetensors")
    assert names(native) == {"shards missing"}
    (native / "model-00001-of-00002.safetensors").rename(native / "model.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (native / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names(native) == {"shards missing"}


def test_a_file_that_is_cut_off(native):
    whole = (native / "model.safetensors").read_bytes()
    (native / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert names(native) == {"shards missing"}


def test_pickle(native, monkeypatch):
    tensors = load_file(native / "model.safetensors")
    torch.save(tensors, native / "medusa_lm_head.pt")
    assert names(native) == {"pickle"}
    (native / "model.safetensors").unlink()
    assert names(native) == {"pickle"}
    with pytest.raises(UserError, match=r"medusa_exp\.model\.convert .*medusa_lm_head\.pt"):
        import_heads(native, lambda: 64)
    monkeypatch.setattr(sys, "argv", ["convert", str(native / "medusa_lm_head.pt")])
    convert_main()
    written = load_file(native / "medusa_lm_head.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert import_heads(native, lambda: 64).num_heads == 3


class Code:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return (eval, ("1 + 1",))


def test_a_pickle_with_code_is_not_loaded(tmp_path):
    torch.save({"a": Code()}, tmp_path / "heads.pt")
    with pytest.raises(UserError, match="holds more than tensors"):
        convert_file(tmp_path / "heads.pt", tmp_path / "heads.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["heads.pt"]


@pytest.fixture
def targets(tmp_path):
    """Directories of two targets of one shape, and the first as a backbone."""
    for seed in (0, 1):
        build_model("llama", seed=seed).save_pretrained(tmp_path / f"target{seed}")
    return tmp_path / "target0", tmp_path / "target1", Backbone(build_model("llama"))


def test_other_target(targets, tmp_path):
    right, wrong, backbone = targets
    exported(backbone, "medusa", "vllm_medusa", tmp_path)
    assert "other target" not in names(tmp_path / "vllm_medusa", target=str(right), device="cpu")
    _, faults = check(str(tmp_path / "vllm_medusa"), str(wrong), "cpu")
    assert [fault.name for fault in faults] == ["other target"]
    assert "identity" in faults[0].text


def test_heads_tied_to_the_matrix_of_another_target(targets, tmp_path):
    _, wrong, backbone = targets
    exported(backbone, "tied", "vllm_medusa", tmp_path)
    edit(tmp_path / "vllm_medusa", {"medusa_backbone_identity": None})
    assert names(tmp_path / "vllm_medusa", target=str(wrong), device="cpu") == {"other target"}


def knowing_heads(backbone, place):
    """Export heads that know the text which the linter asks its target for: fitted to it."""
    heads = build_heads(backbone, num_heads=3, kind="medusa", num_layers=0)
    ids_BT = linter.greedy_text(backbone)
    states_BTD = backbone.hidden_states(ids_BT).detach()
    for k in range(3):
        states_RD = states_BTD[:, : -k - 2].flatten(0, 1)
        truth_RV = torch.nn.functional.one_hot(ids_BT[:, k + 2 :].flatten(), 64).float()
        fitted_DV = torch.linalg.lstsq(states_RD, truth_RV).solution
        heads.lm_heads[k].weight.data = fitted_DV.T.contiguous()
    save_heads(heads, place / "heads")
    source, ours = open_source(place / "heads", backbone, "org/target")
    export(source, ours, backbone, "vllm_medusa", place / "out")
    return place / "out"


def test_order_is_seen_on_the_targets_own_text(targets, tmp_path):
    right, _, backbone = targets
    place = knowing_heads(backbone, tmp_path)
    assert names(place, target=str(right), device="cpu") == set()
    one, two = "lm_heads.1.weight", "lm_heads.2.weight"
    edit(place, {"medusa_heads_sha256": None}, lambda t: {one: t[two], two: t[one]})
    assert names(place) == set()  # nothing in the directory tells
    _, faults = check(str(place), str(right), "cpu")
    errors = [fault for fault in faults if fault.is_error]
    assert {fault.name for fault in errors} == {"heads swapped"}
    assert "head 3's first choice" in errors[-1].text and "that head 2 should" in errors[-1].text


@pytest.mark.parametrize(
    "family", ["medusa", "tied", "both", "hydra", "hydra, prefix", "recurrent"]
)
def test_first_choices_are_those_of_our_heads(backbone, tmp_path, family):
    reading = exported(backbone, family, "vllm", tmp_path)
    heads = load_heads(tmp_path / "heads", backbone).float()
    ids_BT = linter.greedy_text(backbone)
    right_BPK = []
    for ids_T, hidden_TD in zip(ids_BT, backbone.hidden_states(ids_BT), strict=True):
        read_1TD = heads_input(heads.prefix, hidden_TD[None])
        right_BPK.append(answer_ranks(heads, ids_T[1:], read_1TD[0, :-1], 1) == 0)
    length = ids_BT.shape[1] - heads.num_heads - 1
    shares_KJ = first_choices(reading, backbone)
    for k in range(heads.num_heads):  # of tokens that do not repeat the one before
        is_new_BP = (ids_BT[:, k + 2 :] != ids_BT[:, k + 1 : -1])[:, :length].numpy()
        right_BP = np.stack(right_BPK)[:, :length, k]
        assert shares_KJ[k, k + 1] == pytest.approx(right_BP[is_new_BP].mean())
    assert shares_KJ.any()


def test_fresh_heads_predict_the_next_token_and_not_their_own(backbone, tmp_path):
    """A fresh head says what the lm_head says: offset 0, which is no head's."""
    save_heads(build_heads(backbone, num_heads=2), tmp_path / "heads")
    source, ours = open_source(tmp_path / "heads", backbone, "org/target")
    reading = export(source, ours, backbone, "vllm_medusa", tmp_path / "out")
    shares = first_choices(reading, backbone)
    assert shares[:, 0].tolist() == [1.0, 1.0]
    faults = list(linter._acceptance(reading, backbone))
    assert [fault.name for fault in faults] == ["one place off"] * 2


@pytest.mark.parametrize("format_", FORMATS)
def test_no_fault_is_found_where_there_is_none(backbone, tmp_path, format_):
    for family in FAMILIES:
        if format_ == "vllm" or family in ("medusa", "no bias", "no blocks", "tied", "tied, deep"):
            exported(backbone, family, format_, tmp_path / family)
            assert all_faults(read_heads(tmp_path / family / format_)) == []


def test_the_command_line(native, capsys):
    assert main([str(native)]) == 0
    out = capsys.readouterr().out
    assert "vLLM's own format (up to 0.32): 3 heads of 1 blocks" in out and "no error found" in out
    edit(native, {"num_heads": 5})
    assert main([str(native)]) == 1
    assert "error: wrong head count: the config says 5 heads" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is no directory of heads"):
        main([str(native / "nowhere")])


def put(part, change):
    """Return an edit of the first tensor whose name has this part."""

    def edit_tensors(tensors):
        name = next(name for name in sorted(tensors) if part in name)
        return {name: change(tensors[name].clone())}

    return edit_tensors


def without_number(tensor):
    tensor.view(-1)[3] = torch.nan
    return tensor


PLANTED = [
    ("medusa", {}, put("weight", without_number), "not finite"),
    ("medusa", {}, put("lm_heads.2", torch.zeros_like), "projections missing"),
    ("medusa", {}, put("bias", lambda bias: bias[:-1]), "wrong shape"),
    ("medusa", {}, put("bias", lambda bias: bias[0]), "wrong shape"),
    ("medusa", {}, put("lm_heads", torch.flatten), "wrong shape"),
    ("medusa", {}, put("blocks", lambda weight: weight[:0]), "wrong shape"),
    ("medusa", {}, lambda ts: {"blocks.999999999.0.linear.bias": ts["blocks.0.0.linear.bias"]},
     "stray tensors"),
    ("medusa", {}, lambda ts: {n.replace("s.0", "s.1"): t for n, t in ts.items() if "s.0" in n},
     "heads alike"),
    ("rooted", {}, put("root_block.out", lambda weight: weight[:-1]), "wrong shape"),
    ("rooted", {}, put("root_block.inner.bias", lambda bias: bias[:-1]), "wrong shape"),
    ("rooted", {}, put("root_block.skip", torch.Tensor.char), "wrong dtype"),
    ("medusa", {}, lambda ts: {"root_block.out.weight": ts["blocks.0.0.linear.weight"]},
     "wrong family"),
    ("medusa", {"hidden_size": 48}, None, "wrong hidden size"),
    ("medusa", {"hidden_size": "wide", "medusa_heads_sha256": 5}, None, "wrong config"),
    ("medusa", {"vocab_size": None}, None, "wrong config"),
    ("medusa", {"n_predict": 2}, None, "wrong head count"),
    ("medusa", {"architectures": ["LlamaForCausalLM"]}, None, "wrong architecture"),
    ("medusa", {"medusa_kind": "hydra"}, None, "wrong family"),
    ("medusa", {"medusa_kind": "nonsense"}, None, "wrong family"),
    ("medusa", {"medusa_lm_head_bias": True}, None, "wrong family"),
    ("hydra", {"architectures": ["MedusaExpMTP"]}, None, "wrong architecture"),
    ("hydra", {}, put("1.0.skip", torch.t), "transposed"),
    ("rank", {"medusa_rank": 8}, None, "wrong family"),
    ("both", {}, put("token_map", lambda ids: ids.flip(0)), "truncated vocabulary"),
    ("medusa, prefix", {"medusa_prefix_attention": False}, None, "wrong family"),
    ("medusa, prefix", {"num_attention_heads": 5}, None, "wrong family"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "of_config", "of_tensors", "fault"), PLANTED)
def test_what_the_plugin_would_not_load_or_get_wrong(
    backbone, tmp_path, family, of_config, of_tensors, fault
):
    exported(backbone, family, "vllm", tmp_path)
    edit(tmp_path / "vllm", of_config, of_tensors)
    assert fault in names(tmp_path / "vllm")


def test_a_part_of_what_sees_the_root_is_missing(backbone, tmp_path):
    exported(backbone, "rooted", "vllm", tmp_path)
    edit(tmp_path / "vllm", without=["root_block.skip"])
    assert "tensors missing" in names(tmp_path / "vllm")
    edit(tmp_path / "vllm", without=["root_block"])
    assert "wrong family" in names(tmp_path / "vllm")
    with pytest.raises(UserError, match="cannot be imported: their tensors are not those of heads"):
        import_heads(tmp_path / "vllm", lambda: 64)


def test_a_bias_of_what_sees_the_root_is_missing(backbone, tmp_path):
    exported(backbone, "rooted", "vllm", tmp_path)
    edit(tmp_path / "vllm", without=["root_block.inner.bias"])
    assert "bias dropped" in names(tmp_path / "vllm")


def test_a_part_of_the_prefix_attention_is_missing(backbone, tmp_path):
    exported(backbone, "medusa, prefix", "vllm", tmp_path)
    edit(tmp_path / "vllm", without=["prefix.k"])
    assert "tensors missing" in names(tmp_path / "vllm")


def test_a_shared_matrix_is_of_the_vocabulary(backbone, tmp_path):
    exported(backbone, "tied", "vllm_medusa", tmp_path)
    edit(tmp_path / "vllm_medusa", of_tensors=put("lm_head.weight", lambda matrix: matrix[:-3]))
    assert "truncated vocabulary" in names(tmp_path / "vllm_medusa")


def test_tensors_that_stand_in_two_files(native):
    file = native / "model.safetensors"
    (native / "other.safetensors").write_bytes(file.read_bytes())
    assert "tensors twice" in names(native)


@pytest.mark.parametrize("kind", ["pipe", "loop", "folder"])
def test_what_is_no_file_is_not_opened(native, kind):
    file = native / "model.safetensors"
    file.unlink()
    {"pipe": os.mkfifo, "loop": lambda path: path.symlink_to(path), "folder": os.mkdir}[kind](file)
    assert names(native) == {"shards missing"}


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(native, text):
    (native / "model.safetensors.index.json").write_text(text)
    assert names(native) == {"shards missing"}


def test_tgi_takes_another_class_or_file_for_its_speculator(backbone, tmp_path):
    exported(backbone, "medusa", "tgi", tmp_path)
    place = tmp_path / "tgi"
    edit(place, {"architectures": ["MedusaModel"]})
    assert names(place) == {"wrong architecture"}
    edit(place, {"architectures": None})
    (place / "medusa_lm_head.safetensors").rename(place / "model.safetensors")
    assert names(place) == set()
    assert [fault.name for fault in check(str(place))[1]] == ["file misnamed"]


def test_directories_of_something_else(tmp_path, backbone):
    assert names(tmp_path) == {"no heads"}
    backbone.model.save_pretrained(tmp_path / "model")
    assert names(tmp_path / "model") == {"no heads"}
