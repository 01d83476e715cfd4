"""The loss of a row, against formulas written out, and compiled against itself."""

import pytest
import torch
from functorch.compile import make_boxed_func
from loss_formulas import plain_acceptance
from torch._dynamo.backends.common import aot_autograd  # private: torch 2.13
from torch._dynamo.testing import CompileCounterWithBackend  # private: torch 2.13

from medusa_exp.model.row_loss import (
    AcceptanceLoss,
    CrossEntropy,
    Divergence,
    TopAcceptance,
    TopDivergence,
    compiled_loss,
)

LOSSES = [
    CrossEntropy(),
    Divergence(),
    Divergence(measures_acceptance=True),
    TopDivergence(),
    *(AcceptanceLoss(kind) for kind in ("tv", "nla", "lk")),
    *(TopAcceptance(AcceptanceLoss(kind)) for kind in ("tv", "nla", "lk")),
]


def wanted_by(loss, num_rows, vocabulary):
    """What a loss compares logits with."""
    p_CW = torch.randn(num_rows, vocabulary).mul(2).softmax(-1)
    if isinstance(loss, CrossEntropy):
        labels_C = torch.randint(vocabulary, (num_rows,))
        labels_C[::3] = -100  # which no head can say
        return (labels_C,)
    if isinstance(loss, TopDivergence | TopAcceptance):
        top = p_CW.topk(5)
        return top.indices, top.values.log()
    return (p_CW,)


def outcome(loss, logits_CW, wanted):
    """Loss, alpha and the gradient of weighted rows."""
    logits_CW = logits_CW.clone().requires_grad_()
    losses_C, accepted_C = loss(logits_CW, *wanted)
    assert accepted_C is None or not accepted_C.requires_grad
    weights_C = torch.arange(1.0, 1 + len(losses_C))
    [gradient_CW] = torch.autograd.grad((losses_C * weights_C).sum(), logits_CW)
    return losses_C, accepted_C, gradient_CW


@pytest.mark.parametrize("reach", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["tv", "nla", "lk"])
def test_acceptance_losses_and_their_gradients_in_float64(kind, reach):
    torch.manual_seed(1)
    logits_RW = (2 * torch.randn(6, 11, dtype=torch.float64)).requires_grad_()
    p_RW = reach * (2 * torch.randn(6, 11, dtype=torch.float64)).softmax(-1)
    form = AcceptanceLoss(kind, 3.0)
    plain = plain_acceptance(kind, p_RW, logits_RW.softmax(-1), 3.0)
    expected = torch.autograd.grad(plain.sum(), logits_RW)[0]
    for found in (
        form(logits_RW, p_RW)[0],
        form.of(p_RW.log(), logits_RW.log_softmax(-1))[0],
    ):
        torch.testing.assert_close(found, plain)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), logits_RW)[0], expected)
    if kind != "lk":  # its share is a number to autograd, and not to differences
        assert torch.autograd.gradcheck(lambda x: form(x, p_RW)[0], logits_RW)


def test_lk_of_a_constant_share_passes_gradcheck():
    torch.manual_seed(2)
    logits_RW = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    p_RW = torch.randn(4, 7, dtype=torch.float64).softmax(-1)
    form = AcceptanceLoss("lk", 0.0)  # the share is 1: KL alone
    assert torch.autograd.gradcheck(lambda x: form(x, p_RW)[0], logits_RW)


@pytest.mark.parametrize("kind", ["tv", "nla", "lk"])
def test_acceptance_losses_stay_finite_where_nothing_is_accepted(kind):
    logits_RW = torch.tensor([[300.0, 0.0, -300.0], [0.0, 0.0, 0.0]], requires_grad=True)
    log_p_RW = torch.tensor([[-300.0, -300.0, 0.0], [-300.0, -torch.inf, -300.0]])
    form = AcceptanceLoss(kind)
    for found in (
        form(logits_RW, log_p_RW.exp())[0],
        form.of(log_p_RW, logits_RW.log_softmax(-1))[0],
    ):
        assert found.isfinite().all()
        assert torch.autograd.grad(found.sum(), logits_RW)[0].isfinite().all()


def test_alpha_is_the_probability_of_a_token_and_of_kl_only_where_asked_for():
    torch.manual_seed(0)
    logits_CW, p_CW = torch.randn(3, 8), torch.randn(3, 8).softmax(-1)
    losses_C, accepted_C = CrossEntropy()(logits_CW, torch.tensor([5, -100, 2]))
    q_CW = logits_CW.softmax(-1)
    torch.testing.assert_close(accepted_C, torch.stack([q_CW[0, 5], torch.zeros(()), q_CW[2, 2]]))
    assert losses_C[1] == 0  # no head can say it
    measured, alone = (Divergence(measures)(logits_CW, p_CW) for measures in (True, False))
    assert torch.equal(measured[0], alone[0]) and alone[1] is None
    torch.testing.assert_close(measured[1], torch.minimum(p_CW, q_CW).sum(-1))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_logits_in_16_bits_are_read_as_they_are_and_computed_with_in_32(loss):
    torch.manual_seed(0)
    logits_CW, wanted = torch.randn(6, 50).mul(3).bfloat16(), wanted_by(loss, 6, 50)
    found, exact = (outcome(loss, logits, wanted) for logits in (logits_CW, logits_CW.float()))
    assert found[0].dtype == torch.float32 and found[2].dtype == torch.bfloat16
    torch.testing.assert_close(found[:2], exact[:2])
    torch.testing.assert_close(found[2], exact[2].bfloat16())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by torch itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_compiled_once_for_all_numbers_of_rows_it_is_the_same(loss, dtype):
    torch.manual_seed(0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiled_loss(loss, counter)
    for num_rows in (4, 9, 6):
        logits_CW = torch.randn(num_rows, 50).mul(3).to(dtype)
        wanted = wanted_by(loss, num_rows, 50)
        found, plain = (outcome(one, logits_CW, wanted) for one in (compiled, loss))
        torch.testing.assert_close(found, plain)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_of_many_losses_in_a_process_each_is_compiled(caplog):
    """A sweep over train.lk_decay has one for each value; torch allows 8 by itself."""
    torch._dynamo.reset()
    logits_CW, p_CW = torch.randn(4, 9), torch.randn(4, 9).softmax(-1)
    for number in range(12):
        loss = AcceptanceLoss("lk", 20.0 + number)
        outcome(compiled_loss(loss, CompileCounterWithBackend("eager")), logits_CW, (p_CW,))
    assert "cannot compile" not in caplog.text


def test_equal_losses_are_compiled_as_one():
    assert compiled_loss(AcceptanceLoss("lk", 3.0)) is compiled_loss(AcceptanceLoss("lk", 3.0))
    assert compiled_loss(AcceptanceLoss("lk", 3.0)) is not compiled_loss(AcceptanceLoss("lk", 2.0))


def test_where_torch_cannot_compile_it_runs_as_it_is_and_a_line_says_so(caplog):
    calls = []

    def broken(graph, inputs):
        calls.append(graph)
        raise RuntimeError("there is no compiler")

    torch._dynamo.reset()
    logits_CW, labels_C = torch.randn(4, 9), torch.arange(4)
    compiled = compiled_loss(CrossEntropy(), broken)
    for _ in range(2):
        found = outcome(compiled, logits_CW, (labels_C,))
        torch.testing.assert_close(found, outcome(CrossEntropy(), logits_CW, (labels_C,)))
    assert len(calls) == 1 and caplog.text.count("torch cannot compile the loss") == 1
    assert "there is no compiler" in caplog.text


def test_where_torch_cannot_compile_the_gradient_alone_it_runs_as_it_is_too(caplog):
    """It is compiled in the forward pass: a failure in the backward pass would end the training."""
    calls = []

    def compile_forward_only(graph, inputs):
        calls.append(graph)
        if len(calls) > 1:
            raise RuntimeError("no gradient")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compile_forward_only)
    logits_CW, labels_C = torch.randn(4, 9), torch.arange(4)
    compiled = compiled_loss(CrossEntropy(), backend)
    found = outcome(compiled, logits_CW, (labels_C,))
    torch.testing.assert_close(found, outcome(CrossEntropy(), logits_CW, (labels_C,)))
    assert len(calls) == 2 and "no gradient" in caplog.text
