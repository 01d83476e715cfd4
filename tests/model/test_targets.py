"""What is accepted of drawn drafts, as the losses know it, and heads weighted by it."""

from unittest.mock import Mock

import pytest
import torch
from tiny_models import build_model

from medusa_exp.data.batching import label_positions
from medusa_exp.data.datamodule import Batch
from medusa_exp.model import Backbone, build_heads, targets
from medusa_exp.model import loss as loss_module
from medusa_exp.model.loss import (
    Objective,
    acceptance_weights,
    decay_weights,
    medusa_loss,
    medusa_losses,
)
from medusa_exp.model.row_loss import Divergence
from medusa_exp.model.targets import TeacherTargets, kept_rows

LOSSES = [
    ("ce", "full"),
    ("kl", "full"),
    ("topk_kl", "full"),
    *((loss, teacher) for loss in ("tv", "nla", "lk") for teacher in ("full", "top_k")),
]


@pytest.fixture
def case():
    torch.manual_seed(0)
    backbone = Backbone(build_model("llama"))
    shape = {"kind": "medusa_lowrank", "num_tokens": 40}
    heads = build_heads(backbone, num_heads=3, token_counts=torch.arange(64, 0, -1), **shape)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids_BT = torch.randint(0, 64, (4, 20))
    is_trained_BT, ones_BT = torch.rand(4, 20) < 0.7, torch.ones_like(ids_BT)
    labeled = label_positions(is_trained_BT, ones_BT, 3)
    batch = Batch(ids_BT, is_trained_BT, ones_BT, None, labeled=labeled)
    return backbone, heads, batch, backbone.hidden_states(ids_BT)


def trained_on(p_IV, heads, labels_I, loss, teacher):
    """The distribution that a loss teaches at each position, of the head vocabulary."""
    p_IW = p_IV[:, heads.token_map]
    if loss == "ce":
        labels_I = heads.to_head_vocab(labels_I)
        hits_IW = torch.nn.functional.one_hot(labels_I.clamp(min=0), 40)
        return hits_IW * (labels_I >= 0)[:, None]
    if teacher == "top_k" or loss == "topk_kl":
        p_IW = p_IW.where(p_IW >= p_IW.topk(7).values[:, -1:], 0.0)
    return p_IW / p_IW.sum(-1, keepdim=True) if "kl" in loss else p_IW


@pytest.mark.parametrize("form", ["recompute", "at_once"])
@pytest.mark.parametrize(("loss", "teacher"), LOSSES)
def test_what_is_accepted_comes_with_every_loss(case, loss, teacher, form):
    """Of each row alpha = sum_v min(p, q), and of a head its product with those before, there."""
    backbone, heads, batch, hidden_BTD = case
    objective = Objective(loss=loss, teacher=teacher, top_k=7, head_weights="acceptance")
    targets = objective.targets(backbone, heads, hidden_BTD, batch)
    losses = medusa_losses(
        heads,
        hidden_BTD,
        targets,
        batch.labeled,
        batch.input_ids_BT,
        chunk_rows=6,
        form=form,
        measures_acceptance=objective.measures_acceptance,
    )
    hidden_ID = hidden_BTD.flatten(0, 1)
    logits_IV = backbone.next_logits(hidden_ID).detach()
    p_IW = trained_on(logits_IV.softmax(-1), heads, logits_IV.argmax(-1), loss, teacher)
    reached_I = torch.ones(len(hidden_ID))
    for k, (index_R, part) in enumerate(zip(batch.labeled[1:], losses, strict=True)):
        q_RW = heads.head_logits(k, hidden_ID[index_R]).softmax(-1).detach()
        reached_I[index_R] *= torch.minimum(p_IW[index_R + k + 1], q_RW).sum(-1)
        torch.testing.assert_close(part.reached_sum, reached_I[index_R].sum())
        assert 0 < part.reached_sum < part.num_labels and not part.reached_sum.requires_grad
    sum(part.loss_sum for part in losses).backward()


def test_weights_are_the_gradient_of_the_expected_length():
    alpha_K = torch.tensor([0.8, 0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    length = alpha_K.cumprod(0).sum()
    [slope_K] = torch.autograd.grad(length, alpha_K)
    wanted_K = (slope_K * alpha_K).detach()  # by the logarithm of alpha
    weights_K = acceptance_weights(alpha_K.detach().cumprod(0), 0.8)
    torch.testing.assert_close(weights_K / weights_K[0], wanted_K / wanted_K[0])
    assert float(weights_K.sum()) == pytest.approx(sum(decay_weights(0.8, 4)))
    assert not acceptance_weights(torch.zeros(3), 0.8).isnan().any()


def test_a_loss_is_weighted_by_given_weights(case):
    backbone, heads, batch, hidden_BTD = case
    targets = Objective(loss="nla").targets(backbone, heads, hidden_BTD, batch)
    arguments = (heads, hidden_BTD, targets, batch.labeled, batch.input_ids_BT)
    losses = medusa_losses(*arguments, chunk_rows=64)
    means = [part.loss_sum / part.num_labels for part in losses]
    weights = torch.tensor([0.5, 0.25, 0.0]).unbind()
    torch.testing.assert_close(medusa_loss(losses, weights), means[0] / 2 + means[1] / 4)
    assert losses[0].reached_sum is None


@pytest.mark.parametrize("form", ["recompute", "at_once"])
@pytest.mark.parametrize("loss", ["kl", "tv", "nla", "lk"])
def test_the_backbone_is_asked_once_for_all_heads(case, monkeypatch, loss, form):
    """Where there is room; and what comes out is the same where there is none."""
    backbone, heads, batch, hidden_BTD = case
    hidden_BTD = hidden_BTD.detach()
    asked, next_logits = [], backbone.next_logits

    def counted(hidden_RD):
        asked.append(len(hidden_RD))
        return next_logits(hidden_RD)

    monkeypatch.setattr(backbone, "next_logits", counted)
    found = {}
    number = len(batch.labeled[0])
    for most in (number, number - 1):
        room_for = Mock(return_value=most)
        monkeypatch.setattr(loss_module, "kept_rows", room_for)
        asked.clear()
        heads.zero_grad()
        wanted = Objective(loss=loss).targets(backbone, heads, hidden_BTD, batch)
        rest = (batch.labeled, batch.input_ids_BT)
        losses = medusa_losses(heads, hidden_BTD, wanted, *rest, chunk_rows=64, form=form)
        sum(part.loss_sum for part in losses).backward()
        gradients = [p.grad.clone() for p in heads.parameters()]
        found[most] = sum(asked), torch.stack([part.loss_sum for part in losses]), gradients
        room_for.assert_called_once_with(torch.device("cpu"), 40)  # tokens of the head vocabulary
    kept, computed = found[number], found[number - 1]
    assert kept[0] == number < computed[0] / heads.num_heads
    torch.testing.assert_close(kept[1], computed[1])
    for mine, theirs in zip(kept[2], computed[2], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_room_for_what_is_kept(monkeypatch):
    assert kept_rows(torch.device("cpu"), 16_384) == 2**30 // (4 * 16_384)
    monkeypatch.setattr(targets, "gpu_memory", lambda device: 80 * 2**30)
    assert kept_rows(torch.device("cuda"), 128_000) == 5 * 2**30 // (4 * 128_000)


def test_a_teacher_computes_part_by_part(monkeypatch):
    monkeypatch.setattr(targets, "ROWS", 5)
    hidden_BTD = torch.randn(2, 9, 8)
    index_R = torch.tensor([1, 2, 3, 5, 8, 9, 10, 12, 13, 15, 16])
    kept = TeacherTargets(hidden_BTD, torch.nn.Softmax(-1), Divergence(), index_R)
    expected = hidden_BTD.flatten(0, 1).softmax(-1)
    for some in (index_R, torch.tensor([16, 3, 9])):
        torch.testing.assert_close(kept.wanted(*kept.at(some))[0], expected[some])
