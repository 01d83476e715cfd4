"""What comes behind the lm_head is the model's, in all that reads logits: scales, caps, biases."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import ARCHITECTURES, build_model
from tiny_models import SHAPE as TINY
from torch.nn.functional import cross_entropy, linear
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.model.heads import stack_heads
from medusa_exp.model.loss import Objective

SHAPE = {
    **TINY,
    **{"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
CHANGED = {
    "granite 10": ("granite", {"logits_scaling": 10.0}, 0.1),
    "granite 1": ("granite", {"logits_scaling": 1.0}, 1.0),
    "granite 0.1": ("granite", {"logits_scaling": 0.1}, 10.0),
    "granite 6": ("granite", {"logits_scaling": 6.0}, 1 / 6),
    "cohere": ("cohere", {"logit_scale": 0.0625}, 0.0625),
    "gemma 2": ("gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8}, 1.0),
    "phi, a bias": ("phi", {}, 1.0),
}
"""Architecture, its settings, and by how much its logits are larger than its lm_head's."""


def build(name, dtype=torch.float32, zero_rows=9):
    architecture, changed, scale = CHANGED[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SHAPE, **changed})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
        bias = getattr(model.lm_head, "bias", None)
        if bias is not None:
            bias.normal_()
        model.lm_head.weight[:zero_rows] = 0  # as padding rows are
    return model.to(dtype).eval(), scale


def states_and_logits(backbone, length=9):
    ids_1T = torch.arange(11, 11 + length)[None]
    with torch.no_grad():
        return backbone.hidden_states(ids_1T)[0], backbone.model(ids_1T).logits[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHANGED)
def test_next_logits_are_the_models(name, dtype):
    model, scale = build(name, dtype)
    backbone = Backbone(model)
    hidden_TD, logits_TV = states_and_logits(backbone)
    size = float(logits_TV.abs().max())
    assert size > 0
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * size
    torch.testing.assert_close(backbone.next_logits(hidden_TD), logits_TV, rtol=0, atol=tolerance)
    assert backbone.logit_scale == pytest.approx(scale, rel=1e-3)
    backbone.check_hidden_states()
    backbone.check_next_logits()
    backbone.check_packing()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_bare_lm_head_is_called_as_it_is(architecture):
    backbone = Backbone(build_model(architecture))
    hidden_TD, logits_TV = states_and_logits(backbone)
    torch.testing.assert_close(backbone.next_logits(hidden_TD), logits_TV)
    if architecture != "gemma2":  # which caps its logits at 30
        assert backbone.logit_scale == 1.0
        assert torch.equal(backbone.next_logits(hidden_TD), backbone.lm_head(hidden_TD))


def test_states_that_are_scaled_before_the_lm_head():
    backbone = Backbone(build_model("llama"))
    plain_TD, _ = states_and_logits(backbone)
    scaled = Backbone(build_model("llama"))
    scaled.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 4,), prepend=True)
    hidden_TD, logits_TV = states_and_logits(scaled)
    torch.testing.assert_close(hidden_TD, plain_TD / 4)
    scaled.check_hidden_states()
    # The hook stands for code of the model's own before its lm_head, which next_logits is not to
    # run: it starts from what the lm_head reads.
    torch.testing.assert_close(linear(hidden_TD, scaled.lm_head.weight), logits_TV)


@pytest.mark.parametrize("kind", ["medusa", "medusa_tied", "medusa_lowrank", "hydra"])
@pytest.mark.parametrize("name", ["granite 10", "granite 0.1", "cohere", "phi, a bias"])
def test_fresh_heads_are_as_sharp_as_the_model(kind, name):
    backbone = Backbone(build(name)[0])
    more = {"rank": 32} if kind == "medusa_lowrank" else {}
    heads = build_heads(backbone, num_heads=2, kind=kind, **more)
    hidden_TD, logits_TV = states_and_logits(backbone)
    drafted = (torch.arange(22).view(11, 2)[:9],) if heads.is_sequential else ()
    found_TV = heads.head_logits(1, hidden_TD, *drafted)
    torch.testing.assert_close(found_TV, logits_TV, rtol=1e-3, atol=1e-3)
    if not heads.is_sequential:
        stacked_TKV = stack_heads(heads, backbone)(hidden_TD)
        torch.testing.assert_close(stacked_TKV[:, 0], logits_TV, rtol=1e-3, atol=1e-3)


def test_gradients_go_through_the_models_scale():
    model, scale = build("granite 10")
    backbone = Backbone(model.requires_grad_(False))
    hidden_TD = states_and_logits(backbone)[0].clone().requires_grad_()
    labels_T = torch.arange(9)
    cross_entropy(backbone.next_logits(hidden_TD), labels_T).backward()
    found_TD, hidden_TD.grad = hidden_TD.grad, None
    cross_entropy(scale * backbone.lm_head(hidden_TD), labels_T).backward()
    torch.testing.assert_close(found_TD, hidden_TD.grad)


@pytest.mark.parametrize("zero_rows", [0, 9])
def test_logits_that_depend_on_more_than_the_state_are_refused(monkeypatch, zero_rows):
    model, _ = build("granite 1", zero_rows=zero_rows)
    forward = model.forward

    def shifted(input_ids, **arguments):
        output = forward(input_ids=input_ids, **arguments)
        output.logits[..., 20:] += 0.05 * output.logits.abs().max() * (input_ids[..., None] % 3)
        return output

    monkeypatch.setattr(model, "forward", shifted)
    with pytest.raises(UserError, match=r"train\.labels=data"):
        Backbone(model).check_next_logits()


def test_a_body_goes_on_with_its_own_forward():
    model, _ = build("granite 10")
    before = states_and_logits(Backbone(model))[1]
    backbone = Backbone(model)
    assert backbone.logit_scale == pytest.approx(0.1)
    assert "forward" not in vars(backbone.body)
    assert torch.equal(states_and_logits(backbone)[1], before)


def test_a_scale_teaches_what_the_same_scale_in_the_lm_head_teaches():
    model, scale = build("granite 10")
    folded, _ = build("granite 1")
    folded.load_state_dict(model.state_dict())
    with torch.no_grad():
        folded.lm_head.weight.mul_(scale)
    losses = []
    for backbone in (Backbone(model), Backbone(folded)):
        heads = build_heads(backbone, num_heads=2)
        hidden_TD, _ = states_and_logits(backbone)
        index_R = torch.arange(5)
        batch = SimpleNamespace(labeled=[torch.arange(len(hidden_TD))])
        targets = Objective(loss="kl").targets(backbone, heads, hidden_TD[None], batch)
        logits_RV = heads.head_logits(0, hidden_TD[:5])
        losses.append(targets.loss(logits_RV, *targets.wanted(*targets.at(index_R))))
    torch.testing.assert_close(*losses)
