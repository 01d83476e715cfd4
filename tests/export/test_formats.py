"""Every family in every format that can hold it: read back as the same heads, or refused."""

import json
import re

import pytest
import torch
from exported import FAMILIES, exported, logits_of, save_moved
from safetensors.torch import load_file, save_file
from tiny_models import build_model

from medusa_exp.config.limits import words_of
from medusa_exp.config.schema import ExportConfig
from medusa_exp.errors import UserError
from medusa_exp.export import formats, publishing
from medusa_exp.export.check import check
from medusa_exp.export.faults import all_faults
from medusa_exp.export.formats import FORMATS, check_holds, table, why_not
from medusa_exp.export.importing import adopt, import_heads
from medusa_exp.export.reading import read_heads
from medusa_exp.model import Backbone, load_heads
from medusa_exp.model.checkpoint import find_heads
from medusa_exp.model.heads import MedusaHeadsConfig

ONLY_VLLM = {
    "hydra",
    "rooted",
    "rooted, no blocks",
    "rooted, both",
    "recurrent",
    "recurrent, shared",
    "medusa, prefix",
    "hydra, prefix",
}
IMPORTED_AS_THEY_WERE = ("medusa", "no bias", "no blocks", "tied")


def no_vocab_size():
    raise AssertionError("the directory says it")


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_the_same_heads_or_is_refused(backbone, tmp_path, family, format_):
    if family in ONLY_VLLM and format_ != "vllm":
        with pytest.raises(UserError, match=f"export.format={format_} cannot hold heads of kind"):
            exported(backbone, family, format_, tmp_path)
        assert not (tmp_path / format_).exists()
        return
    reading = exported(backbone, family, format_, tmp_path)
    assert reading.format == format_ and len(reading.heads) == 3
    again = read_heads(tmp_path / format_)
    assert [fault for fault in all_faults(again) if fault.is_error] == []
    assert again.declared.backbone_identity == backbone.identity()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "family", ["medusa", "tied", "both", "hydra, prefix", "rooted", "recurrent"]
)
def test_a_smaller_type_is_the_same_heads_rounded(backbone, tmp_path, family, dtype):
    for format_ in FORMATS:
        heads = load_heads_config(backbone, family, tmp_path)
        if why_not(heads, format_) is None:
            reading = exported(backbone, family, format_, tmp_path, dtype)
            assert reading.heads[0].blocks[0].weight.dtype == getattr(torch, dtype)


def load_heads_config(backbone, family, place):
    save_moved(backbone, family, place / "heads")
    return load_heads(place / "heads").config


def test_an_lm_head_with_a_bias_goes_to_vllm_alone(tmp_path):
    backbone = Backbone(build_model("phi"))
    for family in ("medusa", "tied", "both", "hydra"):
        exported(backbone, family, "vllm", tmp_path / family)
        with pytest.raises(UserError, match=r"no bias, and the target's lm_head has one|run side"):
            exported(backbone, family, "tgi", tmp_path / family)


@pytest.mark.parametrize("format_", ["vllm_medusa", "tgi", "mlc"])
@pytest.mark.parametrize(
    ("heads", "remedy"),
    [
        ({"kind": "rooted"}, ", or train with head=medusa, medusa_tied or medusa_lowrank"),
        (
            {"kind": "hydra", "prefix_attention": True},
            ", or train with head=medusa, medusa_tied or medusa_lowrank and "
            "head.prefix_attention=false",
        ),
        ({"prefix_attention": True}, ", or train with head.prefix_attention=false"),
        ({"lm_head_bias": True}, ""),
        ({"kind": "recurrent", "lm_head_bias": True}, ""),
    ],
)
def test_a_refusal_says_what_would_be_held(format_, heads, remedy):
    with pytest.raises(UserError) as refused:
        check_holds(format_, MedusaHeadsConfig(**heads), "these heads")
    wanted = f". Take export.format=vllm or hf_generate{remedy}."
    assert str(refused.value).startswith(f"export.format={format_} cannot hold these heads: ")
    assert str(refused.value).endswith(wanted)
    for possible in ("vllm", "hf_generate"):
        check_holds(possible, MedusaHeadsConfig(**heads), "these heads")


def test_the_table_names_every_format_and_reason():
    rows = {(family, format_): says for family, format_, says in table()}
    assert {format_ for _, format_ in rows} == set(FORMATS)
    assert rows["medusa", "mlc"] == "yes" and "drafted" in rows["hydra", "tgi"]
    assert rows["hydra", "vllm"] == "yes" and rows["recurrent", "vllm"] == "yes"
    assert rows["rooted", "vllm"] == "yes" and "that it gave" in rows["rooted", "mlc"]
    assert "share one" in rows["recurrent", "tgi"]
    assert {*FORMATS} <= {*words_of(ExportConfig, "format")}


def test_the_config_for_vllm_is_what_its_plugin_reads(backbone, tmp_path):
    exported(backbone, "hydra, prefix", "vllm", tmp_path)
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert config["architectures"] == ["MedusaExpMTP", "DeepSeekMTPModel"]
    assert config["model_type"] == "step3p5_mtp" and config["n_predict"] == 3
    assert config["num_nextn_predict_layers"] == 3 and config["num_hidden_layers"] == 1
    assert config["max_position_embeddings"] == 128 and config["num_attention_heads"] == 4
    assert config["medusa_kind"] == "hydra" and config["medusa_prefix_attention"] is True
    ours = load_file(tmp_path / "heads" / "model.safetensors")
    theirs = load_file(tmp_path / "vllm" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("format_", ["medusa_exp", "vllm"])
def test_recurrent_heads_that_do_not_say_so_have_one_projection(backbone, tmp_path, format_):
    ours = save_moved(backbone, "recurrent, shared", tmp_path / "heads")
    place = tmp_path / "heads"
    if format_ == "vllm":
        exported(backbone, "recurrent, shared", "vllm", tmp_path)
        place = tmp_path / "vllm"
    config = json.loads((place / "config.json").read_text())
    del config["own_projections" if format_ == "medusa_exp" else "medusa_own_projections"]
    (place / "config.json").write_text(json.dumps(config))
    (tmp_path / "heads" / "sha256.json").unlink(missing_ok=True)
    reading = read_heads(place)
    assert [fault for fault in all_faults(reading) if fault.is_error] == []
    assert len(reading.heads) == 3 and reading.is_one_projection
    for heads in (import_heads(place, no_vocab_size), load_heads(tmp_path / "heads")):
        assert heads.num_parameters() == ours.num_parameters()


def test_blocks_and_projections_that_recurrent_heads_do_not_have_are_found(backbone, tmp_path):
    save_moved(backbone, "recurrent", tmp_path / "heads")
    file = tmp_path / "heads" / "model.safetensors"
    tensors = load_file(file)
    assert not read_heads(tmp_path).is_one_projection
    save_file(
        tensors | {"blocks.1.0.inner.weight": tensors["blocks.0.0.inner.weight"].clone()}, file
    )
    [fault] = [f for f in all_faults(read_heads(tmp_path)) if f.name == "stray tensors"]
    assert "blocks.1" in fault.text and fault.is_error
    one = {
        n: t
        for n, t in tensors.items()
        if n not in ("lm_heads.up.1.weight", "lm_heads.up.2.weight")
    }
    save_file(one, file)
    said = [f.text for f in all_faults(read_heads(tmp_path)) if f.is_error]
    assert any("head 2 not has a vocabulary projection" in text for text in said)


def test_a_single_recurrent_head_is_as_its_config_says(backbone, tmp_path):
    for own, family in ((True, "recurrent"), (False, "recurrent, shared")):
        save_moved(backbone, family, tmp_path / family / "heads", num_heads=1)
        source, ours = publishing.open_source(
            tmp_path / family / "heads", backbone, "org/target", "auto"
        )
        for format_ in ("medusa_exp", "vllm"):
            place = tmp_path / family / ("heads" if format_ == "medusa_exp" else "vllm")
            if format_ == "vllm":
                publishing.export(source, ours, backbone, "vllm", place)
            assert [fault for fault in all_faults(read_heads(place)) if fault.is_error] == []
            assert import_heads(place, no_vocab_size).config.own_projections is own


def test_projections_that_are_lost_are_not_made_up_from_others(backbone, tmp_path):
    exported(backbone, "recurrent", "vllm", tmp_path)
    file = tmp_path / "vllm" / "model.safetensors"
    tensors = load_file(file)
    for lost in ({"lm_heads.up.2.weight"}, {"lm_heads.up.1.weight", "lm_heads.up.2.weight"}):
        save_file({name: t for name, t in tensors.items() if name not in lost}, file)
        assert [fault for fault in all_faults(read_heads(tmp_path / "vllm")) if fault.is_error]
        with pytest.raises(UserError):
            import_heads(tmp_path / "vllm", no_vocab_size)


def _lose_bias(config, tensors):
    return {name: t for name, t in tensors.items() if not name.endswith("bias")}


def _lose_matrix(config, tensors):
    return {name: t for name, t in tensors.items() if name != "lm_heads.1.weight"}


def _swap(config, tensors):
    other = {"lm_heads.0.weight": "lm_heads.1.weight", "lm_heads.1.weight": "lm_heads.0.weight"}
    return {other.get(name, name): t for name, t in tensors.items()}


def _transpose(config, tensors):
    return {n: t.T.contiguous() if "layers" in n and t.ndim == 2 else t for n, t in tensors.items()}


@pytest.mark.parametrize("fault", [_lose_bias, _lose_matrix, _swap, _transpose])
def test_a_writer_that_is_wrong_publishes_nothing(backbone, tmp_path, monkeypatch, fault):
    def wrong(source):
        config, tensors = formats._vllm_medusa(source)
        return config, fault(config, tensors)

    broken = formats.Format(wrong, "model.safetensors", reads_all=False)
    monkeypatch.setitem(formats.FORMATS, "vllm_medusa", broken)
    with pytest.raises(UserError, match=r"does not read back"):
        exported(backbone, "medusa", "vllm_medusa", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]


def test_rows_of_zeros_stand_for_tokens_that_heads_do_not_know(backbone, tmp_path):
    reading = exported(backbone, "both", "vllm_medusa", tmp_path)
    assert not reading.heads[0].out[40:].any() and reading.heads[0].out[:40].any(1).all()
    notes = [fault for fault in all_faults(reading) if not fault.is_error]
    assert [note.name for note in notes] == ["truncated vocabulary"]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("family", IMPORTED_AS_THEY_WERE)
def test_what_was_exported_is_imported_bit_for_bit(backbone, tmp_path, family, format_):
    exported(backbone, family, format_, tmp_path)
    heads = load_heads(tmp_path / "heads")
    found = import_heads(tmp_path / format_, lambda: 64)
    assert found.num_heads == 3 and found.config.num_layers == heads.config.num_layers
    assert torch.equal(logits_of(found, backbone), logits_of(heads, backbone))
    assert found.config.backbone_identity == backbone.identity()
    if format_ == "vllm":
        assert found.config.kind == heads.config.kind


def test_heads_of_modelopt_are_imported(backbone, tmp_path):
    exported(backbone, "no bias", "mlc", tmp_path)
    file = tmp_path / "mlc" / "model.safetensors"
    tensors = load_file(file)
    save_file({re.sub("^medusa_head", "medusa_heads", n): t for n, t in tensors.items()}, file)
    found = import_heads(tmp_path / "mlc", no_vocab_size)
    ours = load_heads(tmp_path / "heads")
    assert read_heads(tmp_path / "mlc").format == "modelopt"
    assert torch.equal(logits_of(found, backbone), logits_of(ours, backbone))


@pytest.mark.parametrize("family", ["both", "frequent", "rank", "hydra", "hydra, prefix"])
def test_our_own_export_keeps_what_others_cannot(backbone, tmp_path, family):
    heads = save_moved(backbone, family, tmp_path / "heads")
    exported(backbone, family, "vllm", tmp_path)
    found = import_heads(tmp_path / "vllm", no_vocab_size)
    ours, theirs = heads.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    for key in MedusaHeadsConfig.__annotations__:
        if key != "model_type":
            assert getattr(found.config, key) == getattr(heads.config, key), key


def test_heads_are_adopted_once_and_others_refused(backbone, tmp_path):
    exported(backbone, "medusa", "tgi", tmp_path)
    run = tmp_path / "run"
    for _ in range(2):
        adopt(str(tmp_path / "tgi"), run, no_vocab_size)
    assert isinstance(load_heads(run / "heads", backbone).config, MedusaHeadsConfig)
    exported(backbone, "no bias", "vllm_medusa", tmp_path)
    with pytest.raises(UserError, match="other heads than those in"):
        adopt(str(tmp_path / "vllm_medusa"), run, no_vocab_size)


def test_heads_are_adopted_from_beside_a_whole_model(backbone, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    backbone.model.save_pretrained(whole)
    for key in ("heads_from", "train.heads_from"):
        with pytest.raises(UserError, match=f"{key}=.* holds no heads"):
            find_heads(key, str(whole))
    with pytest.raises(UserError, match="holds no Medusa heads that are known here"):
        adopt(str(whole), run, no_vocab_size)
    save_moved(backbone, "medusa", whole / "heads")
    for named in (whole, whole / "heads", whole):
        adopt(str(named), run, no_vocab_size)
        assert find_heads("heads_from", str(named)) == whole / "heads"
    ours, theirs = (load_file(place / "heads" / "model.safetensors") for place in (run, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"kind": "other"}, {"num_layers": 2}])
def test_heads_that_cannot_be_loaded_are_not_put_in_place(backbone, tmp_path, change):
    source, run = tmp_path / "heads", tmp_path / "run"
    save_moved(backbone, "medusa", source)
    (source / "sha256.json").unlink()  # changed on purpose
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=re.escape(f"{source}")):
        adopt(str(source), run, no_vocab_size)
    assert not run.exists()


def test_heads_without_a_matrix_take_the_vocabulary_of_the_model(backbone, tmp_path):
    exported(backbone, "tied", "tgi", tmp_path)
    config = tmp_path / "tgi" / "config.json"
    bare = {"medusa_num_heads": 3, "medusa_num_layers": 1, "base_model_name_or_path": "org/x"}
    config.write_text(json.dumps(bare))
    heads = import_heads(tmp_path / "tgi", lambda: 64)
    assert heads.config.kind == "medusa_tied" and heads.config.vocab_size == 64
    assert heads.config.backbone == "org/x" and heads.config.backbone_identity == ""


def test_what_would_be_lost_is_not_imported(backbone, tmp_path):
    exported(backbone, "medusa", "tgi", tmp_path)
    file = tmp_path / "tgi" / "medusa_lm_head.safetensors"
    save_file({**load_file(file), "0.0.gate.weight": torch.ones(2)}, file)
    with pytest.raises(UserError, match=r"cannot be imported: 1 tensors are no part of this"):
        import_heads(tmp_path / "tgi", lambda: 64)


def test_the_comparison_needs_bit_equality(backbone, tmp_path):
    reading = exported(backbone, "medusa", "tgi", tmp_path)
    _, ours = publishing.open_source(tmp_path / "heads", backbone, "org/target")
    reading.heads[1].blocks[0].bias[3] += 1e-4
    with pytest.raises(UserError, match="logits of head 2 differ"):
        publishing.compare(reading, ours, backbone)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("family", "format_"), [("tied", "mlc"), ("tied, deep", "tgi")])
def test_tied_heads_are_stored_in_one_type(backbone, tmp_path, family, format_, dtype):
    exported(backbone, family, format_, tmp_path, dtype)
    _, faults = check(str(tmp_path / format_))
    assert faults == []
    assert import_heads(tmp_path / format_, no_vocab_size).num_heads == 3
