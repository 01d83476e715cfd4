"""Medusa-2: adapters on the backbone learn together with the heads."""

import pytest
import torch
from interrupted import dies_at
from sessions import session_of
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_exp.config import Config, LoraSettings
from medusa_exp.config import HeadConfig as Head
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, load_heads
from medusa_exp.model.adapters import add_adapters
from medusa_exp.stages import train
from medusa_exp.train.callbacks import TrainingPreview
from medusa_exp.train.module import MedusaModule


@pytest.fixture
def config(config, tmp_path) -> Config:
    config.train.kind = "medusa2"
    config.train.lora = LoraSettings(rank=4, dropout=0.1, learning_rate=5e-3)
    config.decode.max_new_tokens = 8
    config.dtype.precision = "32-true"
    return config


def run(config, out):
    out.mkdir(exist_ok=True)
    config.run_dir = str(out)
    return train.run(config, out)


def adapted_heads(config, out):
    config.run_dir = str(out)
    backbone = session_of(config).backbone()
    return backbone, load_heads(out / "heads", backbone)


@pytest.mark.parametrize("output", ["merged", "adapter"])
def test_later_stages_get_the_adapted_backbone_and_its_heads(config, tmp_path, output):
    config.train.lora.output = output
    metrics = run(config, tmp_path / "run")
    before, after = (metrics[f"train/backbone_nats_{w}"] for w in ("before", "after"))
    assert after < before and metrics["train/loss_backbone"] > 0
    backbone, heads = adapted_heads(config, tmp_path / "run")
    original = session_of(config).backbone(is_adapted=False)
    assert backbone.is_adapted and not original.is_adapted
    names = [name for name, _ in backbone.model.named_parameters()]
    assert names == [name for name, _ in original.model.named_parameters()]
    assert not torch.equal(
        backbone.body.layers[0].mlp.up_proj.weight, original.body.layers[0].mlp.up_proj.weight
    )
    assert torch.equal(backbone.lm_head.weight, original.lm_head.weight)
    with pytest.raises(UserError, match="whose identity is"):
        load_heads(tmp_path / "run" / "heads", original)
    assert heads.config.backbone.endswith("backbone")


def test_a_backbone_that_has_decoded_before_gets_a_new_identity(config, tmp_path):
    """As in stage regenerate of the same command, which notes the identity as it packs layers."""
    config.run_dir = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    session = session_of(config)
    session.backbone().names.keep()
    train.run(config, tmp_path / "run", session)
    backbone, heads = adapted_heads(config, tmp_path / "run")
    assert heads.config.backbone_identity == backbone.identity()


def test_merged_and_adapter_are_the_same_model(config, tmp_path):
    found = []
    for output in ("merged", "adapter"):
        config.train.lora.output = output
        run(config, tmp_path / output)
        found.append(adapted_heads(config, tmp_path / output)[0])
    ids_1T = torch.tensor([[5, 6, 7, 8]])
    one, other = (backbone.model(ids_1T).logits for backbone in found)
    torch.testing.assert_close(one, other)
    assert found[0].identity() == found[1].identity()
    config.model.path = str(tmp_path / "adapter" / "backbone")
    with pytest.raises(UserError, match="holds adapters, no model"):
        session_of(config).backbone(is_adapted=False)


def test_the_heads_learn_alone_at_first(config, tmp_path, monkeypatch):
    config.train.lora.heads_only_fraction, config.train.max_steps = 0.5, 6
    moved = {}
    end = MedusaModule.on_train_batch_end

    def spy(module, *arguments):
        end(module, *arguments)
        ups = [p for n, p in module.adapted.named_parameters() if "lora_B" in n]
        moved[module.global_step] = any(p.any() for p in ups)

    monkeypatch.setattr(MedusaModule, "on_train_batch_end", spy)
    run(config, tmp_path / "run")
    assert moved == {1: False, 2: False, 3: False, 4: True, 5: True, 6: True}


def test_self_distillation_stays_nearer_to_what_it_was(config, tmp_path):
    distances = {}
    ids_1T = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    for is_on in (False, True):
        config.train.lora.self_distillation, config.train.max_steps = is_on, 20
        config.train.coefficient = 0.01
        run(config, tmp_path / str(is_on))
        backbone, _ = adapted_heads(config, tmp_path / str(is_on))
        original = session_of(config).backbone(is_adapted=False)
        one, other = (b.model(ids_1T).logits.log_softmax(-1) for b in (backbone, original))
        distances[is_on] = (one - other).abs().mean().item()
    assert distances[True] < 0.7 * distances[False]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_dropout_and_all_it_goes_on_as_if_nothing_had_been(
    config, tmp_path, gradient_checkpointing
):
    config.train.lora.gradient_checkpointing = gradient_checkpointing
    run(config, tmp_path / "whole")
    with dies_at(7):
        run(config, tmp_path / "cut")
    run(config, tmp_path / "cut")
    whole, cut = (adapted_heads(config, tmp_path / name) for name in ("whole", "cut"))
    for mine, theirs in zip(whole[0].model.parameters(), cut[0].model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(whole[1].parameters(), cut[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    saved = torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("heads.") or "lora_" in name for name in saved)


def test_a_run_of_medusa_1_is_a_start(config, tmp_path):
    config.train.kind = "medusa1"
    first = run(config, tmp_path / "first")
    config.train.kind, config.train.heads_from = "medusa2", str(tmp_path / "first")
    config.train.max_steps, config.train.val_every = 1, 1
    second = run(config, tmp_path / "second")
    assert second["val/loss_head1"] < first["val/loss_head1"] + 0.5
    config.head = Head(num_heads=2, kind="auto")  # the family is that of these heads
    run(config, tmp_path / "auto")
    assert load_heads(tmp_path / "auto" / "heads").config.kind == "medusa"
    config.head = Head(num_heads=3)
    with pytest.raises(UserError, match=r"has num_heads=2, and this run head\.num_heads=3"):
        run(config, tmp_path / "third")
    config.train.heads_from = str(tmp_path)
    with pytest.raises(UserError, match=r"heads_from=.* holds no heads"):
        run(config, tmp_path / "third")


@pytest.mark.parametrize(
    ("layers", "message"), [(["lm_head"], "stays as it is"), (["nothing"], "nothing")]
)
def test_layers_that_cannot_be_adapted(config, tmp_path, layers, message):
    config.train.lora.layers = layers
    with pytest.raises(UserError, match=rf"train\.lora\.layers.*{message}"):
        run(config, tmp_path / "run")


def test_it_validates_without_a_held_out_prompt(config, tmp_path):
    config.train.val_prompts = 0
    metrics = run(config, tmp_path / "run")
    assert "val/loss_head1" in metrics and "val/accept_length" not in metrics


def test_the_preview_is_of_the_steps_in_which_both_learn_too(config, tmp_path, monkeypatch, caplog):
    """The first ones are cheaper, and would promise too little time and memory."""
    caplog.set_level("INFO")
    monkeypatch.setattr("medusa_exp.train.callbacks.PREVIEW_STEPS", 3)
    config.train.lora.heads_only_fraction, config.train.max_steps = 0.5, 12
    measured = []
    log = TrainingPreview._log

    def spy(preview, trainer, module, batch, seconds, steps):
        measured.append((trainer.global_step, steps))
        log(preview, trainer, module, batch, seconds, steps)

    monkeypatch.setattr(TrainingPreview, "_log", spy)
    run(config, tmp_path / "run")
    assert measured == [(3, 3), (9, 3)]
    said = [line for line in caplog.messages if line.startswith("a step (")]
    assert [" of the heads alone, " in line for line in said] == [True, False]


ONE_LAYER = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1}
EXPERTS = {
    **ONE_LAYER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "num_local_experts": 2,
}


@pytest.mark.parametrize(
    ("kind", "shape", "said"),
    [
        ("mixtral", EXPERTS, "is adapted without dropout (train.lora.dropout=0.1 "),
        ("phimoe", EXPERTS, ""),  # its router returns two tensors
        ("falcon", EXPERTS, ""),  # all its linear layers are of a class of its own
        ("mamba", ONE_LAYER, "is adapted without out_proj and conv1d"),
    ],
)
def test_what_peft_refuses_of_an_architecture_is_left_out_and_said(kind, shape, said, caplog):
    config = AutoConfig.for_model(kind, **shape)
    backbone = Backbone(AutoModelForCausalLM.from_config(config))
    plain = backbone.model(torch.arange(8)[None]).logits
    with caplog.at_level("WARNING"):
        adapted = add_adapters(backbone, LoraSettings(dropout=0.1)).train()
    assert said in caplog.text
    adapted(torch.arange(8)[None]).logits.sum().backward()
    learning = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert any(p.grad is not None and p.grad.any() for p in learning)
    assert torch.equal(adapted.eval()(torch.arange(8)[None]).logits, plain), "they start as nothing"


def test_layers_that_are_named_are_not_left_out(caplog):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **ONE_LAYER))
    with pytest.raises(UserError, match=r"train\.lora\.layers=\['out_proj'\]: .*Mamba"):
        add_adapters(Backbone(model), LoraSettings(layers=["out_proj"]))
