import weakref

import pytest
import torch
from loss_formulas import plain_acceptance
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode  # private: torch 2.13
from torch.utils._pytree import tree_leaves  # private: torch 2.13

from medusa_exp.data.batching import label_positions
from medusa_exp.model import build_heads
from medusa_exp.model.loss import (
    _even_rows,
    head_labels,
    loss_and_acceptance,
    medusa_counts,
    medusa_loss,
    medusa_losses,
)
from medusa_exp.model.row_loss import AcceptanceLoss, Divergence, TopAcceptance
from medusa_exp.model.targets import TeacherTargets, TokenTargets, TopTargets
from medusa_exp.train.defaults import LOGIT_BYTES

#         u1  u2  a1  a2  end pad     two tokens of the user's, three of the assistant's
IDS_BT = torch.tensor([[11, 12, 21, 22, 2, 0]])
IS_TRAINED_BT = torch.tensor([[False, False, True, True, True, False]])


@pytest.mark.parametrize(
    ("head", "positions", "labels"),
    [
        # Head k at t predicts token t+1+k; the lm_head's own t+1 is no head's business.
        (1, [0, 1, 2], [21, 22, 2]),
        (2, [0, 1], [22, 2]),
        (3, [0], [2]),
        (4, [], []),
    ],
)
def test_labels_of_a_hand_written_example(head, positions, labels):
    index_R, labels_R = head_labels(IDS_BT, IS_TRAINED_BT, torch.ones_like(IDS_BT), head)
    assert index_R.tolist() == positions
    assert labels_R.tolist() == labels


def test_a_sequence_shorter_than_the_heads_reach():
    index_R, labels_R = head_labels(
        IDS_BT[:, :2], IS_TRAINED_BT[:, :2], torch.ones_like(IDS_BT[:, :2]), 3
    )
    assert index_R.numel() == labels_R.numel() == 0


@pytest.fixture
def example(backbone):
    torch.manual_seed(0)
    heads = build_heads(backbone, num_heads=3)
    hidden_BTD = torch.randn(4, 20, backbone.hidden_size)
    ids_BT = torch.randint(0, backbone.vocab_size, (4, 20))
    return heads, hidden_BTD, ids_BT, torch.rand(4, 20) < 0.6


def labeled(is_trained_BT):
    return label_positions(is_trained_BT, is_trained_BT.new_ones(is_trained_BT.shape).long(), 3)


@pytest.mark.parametrize("form", ["recompute", "at_once"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_equals_the_plain_form_with_its_gradients(example, chunk_rows, form):
    heads, hidden_BTD, ids_BT, is_trained_BT = example
    labels_BT = ids_BT.masked_fill(~is_trained_BT, -100)
    logits_BTKV = heads(hidden_BTD)
    plain = sum(
        0.8**k
        * cross_entropy(
            logits_BTKV[:, : -(1 + k), k - 1].flatten(0, 1), labels_BT[:, 1 + k :].flatten()
        )
        for k in (1, 2, 3)
    )
    parameters = list(heads.parameters())
    expected = torch.autograd.grad(plain, parameters)
    inputs = (hidden_BTD, TokenTargets(ids_BT), labeled(is_trained_BT))
    losses = medusa_losses(heads, *inputs, ids_BT, chunk_rows=chunk_rows, form=form)
    ours = medusa_loss(losses, 0.8)
    torch.testing.assert_close(ours, plain)
    for mine, theirs in zip(torch.autograd.grad(ours, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_counts(example):
    heads, hidden_BTD, ids_BT, is_trained_BT = example
    inputs = (hidden_BTD, ids_BT, labeled(is_trained_BT))
    counts_K4 = medusa_counts(heads, *inputs, ids_BT, chunk_rows=5)
    losses = medusa_losses(
        heads, hidden_BTD, TokenTargets(ids_BT), *inputs[2:], ids_BT, chunk_rows=5
    )
    for k, (loss, top1, top5, labels) in enumerate(counts_K4, 1):
        index_R, labels_R = head_labels(ids_BT, is_trained_BT, torch.ones_like(ids_BT), k)
        guesses = heads(hidden_BTD.flatten(0, 1)[index_R])[:, k - 1].topk(5).indices
        assert loss.item() == pytest.approx(losses[k - 1].loss_sum.item(), rel=1e-5)
        assert top1 == (guesses[:, 0] == labels_R).sum()
        assert top5 == (guesses == labels_R[:, None]).sum()
        assert labels == len(labels_R)


def test_no_label_gives_zero_not_nan(example):
    heads, hidden_BTD, ids_BT, _ = example
    none = torch.zeros_like(ids_BT, dtype=torch.bool)
    inputs = (hidden_BTD, TokenTargets(ids_BT), labeled(none))
    loss = medusa_loss(medusa_losses(heads, *inputs, ids_BT, chunk_rows=8), 0.8)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.isnan().any() for p in heads.parameters())


@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_divergence_from_the_backbone(example, backbone, chunk_rows):
    """Head k at t is to say what the lm_head says at t+k."""
    heads, hidden_BTD, ids_BT, is_trained_BT = example
    expected, labels = [], []
    for k in (1, 2, 3):
        where_BS = is_trained_BT[:, 1 + k :]
        teacher_RV = backbone.lm_head(hidden_BTD[:, k:-1][where_BS]).detach().log_softmax(-1)
        head_RV = heads.head_logits(k - 1, hidden_BTD[:, : -1 - k][where_BS]).log_softmax(-1)
        expected.append((teacher_RV.exp() * (teacher_RV - head_RV)).sum())
        labels.append(len(head_RV))
    rest = (labeled(is_trained_BT), ids_BT)
    parameters = list(heads.parameters())
    gradients = torch.autograd.grad(torch.stack(expected).sum(), parameters)
    everywhere = torch.arange(ids_BT.numel())

    def probabilities(hidden_RD):
        return backbone.next_logits(hidden_RD).softmax(-1)

    full = TeacherTargets(hidden_BTD, probabilities, Divergence())
    kept = TeacherTargets(hidden_BTD, probabilities, Divergence(), everywhere)
    top = TopTargets(hidden_BTD, everywhere, backbone.next_logits, backbone.vocab_size)
    for targets in (full, kept, top):  # all tokens are the likeliest ones
        losses = medusa_losses(heads, hidden_BTD, targets, *rest, chunk_rows=chunk_rows)
        assert [loss.num_labels for loss in losses] == labels
        for loss, value in zip(losses, expected, strict=True):
            torch.testing.assert_close(loss.loss_sum, value.detach())
        ours = torch.autograd.grad(sum(loss.loss_sum for loss in losses), parameters)
        for mine, theirs in zip(ours, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["recompute", "at_once"])
@pytest.mark.parametrize("kind", ["tv", "nla", "lk"])
@pytest.mark.parametrize("num_tokens", [None, 20])
def test_acceptance_in_chunks_equals_the_plain_form(backbone, kind, num_tokens, form):
    """Of heads with all tokens, and of heads that cannot reach what p has beyond theirs."""
    torch.manual_seed(0)
    counts = torch.arange(backbone.vocab_size) if num_tokens else None
    options = {"kind": "medusa_lowrank", "num_tokens": num_tokens} if num_tokens else {}
    heads = build_heads(backbone, num_heads=2, token_counts=counts, **options)
    hidden_BTD = torch.randn(3, 12, backbone.hidden_size)
    ids_BT, is_trained_BT = torch.randint(0, 9, (3, 12)), torch.rand(3, 12) < 0.7
    index = label_positions(is_trained_BT, torch.ones_like(ids_BT), 2)
    expected = []
    for k in (1, 2):
        where_BS = is_trained_BT[:, 1 + k :]
        p_RV = backbone.next_logits(hidden_BTD[:, k:-1][where_BS]).detach().softmax(-1)
        q_RW = heads.head_logits(k - 1, hidden_BTD[:, : -1 - k][where_BS]).softmax(-1)
        expected.append(plain_acceptance(kind, heads.from_head_vocab(p_RV), q_RW).sum())
    parameters = list(heads.parameters())
    gradients = torch.autograd.grad(sum(expected), parameters)

    def log_probs(hidden_RD):
        return heads.from_head_vocab(backbone.next_logits(hidden_RD).log_softmax(-1))

    loss, size = AcceptanceLoss(kind), num_tokens or backbone.vocab_size

    def probabilities(hidden_RD):
        return log_probs(hidden_RD).exp()

    everywhere = torch.arange(ids_BT.numel())
    for targets in (
        TeacherTargets(hidden_BTD, probabilities, loss),
        TeacherTargets(hidden_BTD, probabilities, loss, index[0]),
        TopTargets(hidden_BTD, everywhere, log_probs, size, TopAcceptance(loss)),
    ):
        losses = medusa_losses(heads, hidden_BTD, targets, index, ids_BT, chunk_rows=5, form=form)
        for found, value in zip(losses, expected, strict=True):
            torch.testing.assert_close(found.loss_sum, value.detach())
        ours = torch.autograd.grad(sum(found.loss_sum for found in losses), parameters)
        for mine, theirs in zip(ours, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_one_likeliest_token_is_a_label(example, backbone):
    heads, hidden_BTD, ids_BT, is_trained_BT = example
    teacher_BT = torch.zeros_like(ids_BT)
    teacher_BT[:, 1:] = backbone.lm_head(hidden_BTD[:, :-1]).argmax(-1)
    rest = (labeled(is_trained_BT), ids_BT)
    top = TopTargets(hidden_BTD, labeled(is_trained_BT)[0], backbone.next_logits, 1)
    one = medusa_losses(heads, hidden_BTD, top, *rest, chunk_rows=8)
    label = medusa_losses(heads, hidden_BTD, TokenTargets(teacher_BT), *rest, chunk_rows=8)
    for mine, theirs in zip(one, label, strict=True):
        torch.testing.assert_close(mine.loss_sum, theirs.loss_sum)


def test_totals_of_a_larger_batch(example):
    """Parts of a batch, each divided by the labels of all, sum up to the whole's loss."""
    heads, hidden_BTD, ids_BT, is_trained_BT = example
    is_trained_BT[0] = False  # a part without a label

    def losses(rows):
        targets = TokenTargets(ids_BT[rows])
        rest = (labeled(is_trained_BT[rows]), ids_BT[rows])
        return medusa_losses(heads, hidden_BTD[rows], targets, *rest, chunk_rows=8)

    whole = losses(slice(0, 4))
    totals = [loss.num_labels for loss in whole]
    parts = [medusa_loss(losses(slice(b, b + 1)), 0.8, totals) for b in range(4)]
    assert parts[0] == 0
    torch.testing.assert_close(sum(parts), medusa_loss(whole, 0.8))


def test_chunks_are_equally_full():
    """Five chunks of 1024 for 4,100 rows would compute a fifth of padding."""
    assert _even_rows(4100, 4096) == 2304 and _even_rows(4096, 4096) == 4096
    for number in (0, 1, 255, 256, 257, 1000, 4900, 20_000):
        assert _even_rows(number, 256) == 256 and _even_rows(number, 7) == 7
        for most in (1000, 1024, 8192):
            rows = _even_rows(number, most)
            count = max(1, -(-number // rows))
            assert rows <= most and count == max(1, -(-number // most))
            assert rows * count - number < 256 * count or most % 256 or not number


class Held(TorchDispatchMode):
    """Adds up the bytes of all tensors that exist at one time."""

    def __init__(self):
        super().__init__()
        self.bytes_of, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(found)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.bytes_of:
                self.bytes_of[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.bytes_of.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.bytes_of.values()))
        return found


@pytest.mark.parametrize("form", ["recompute", "at_once"])
@pytest.mark.parametrize("loss", ["ce", "kl", "topk_kl", "tv", "nla", "lk"])
def test_bytes_of_a_logit(loss, form):
    """By these, rows of a chunk are chosen."""
    vocabulary, rows = 4000, 256
    projection = torch.nn.Linear(8, vocabulary, bias=False)
    frozen = torch.nn.Linear(8, vocabulary, bias=False).requires_grad_(False)
    hidden_1TD, index_R = torch.randn(1, rows + 1, 8), torch.arange(rows)

    def probabilities(hidden_RD):
        return frozen(hidden_RD).float().softmax(-1)

    targets = {
        "ce": lambda: TokenTargets(torch.zeros(1, rows + 1, dtype=torch.long)),
        "kl": lambda: TeacherTargets(hidden_1TD, probabilities, Divergence()),
        "topk_kl": lambda: TopTargets(hidden_1TD, torch.arange(rows + 1), frozen, 4),
        "tv": lambda: TeacherTargets(hidden_1TD, probabilities, AcceptanceLoss("tv")),
        "nla": lambda: TeacherTargets(hidden_1TD, probabilities, AcceptanceLoss("nla")),
        "lk": lambda: TeacherTargets(hidden_1TD, probabilities, AcceptanceLoss("lk")),
    }[loss]()
    parameters = list(projection.parameters()) if form == "at_once" else []
    with Held() as held, torch.autocast("cpu", torch.bfloat16):
        read = (hidden_1TD[0, :rows],)
        wanted = targets.at(index_R)
        loss_and_acceptance(projection, targets, read, wanted, rows, parameters)[0].backward()
    assert 0.95 * LOGIT_BYTES[loss] < held.peak / (vocabulary * rows) < 1.1 * LOGIT_BYTES[loss]
