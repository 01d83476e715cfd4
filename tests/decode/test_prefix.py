"""What heads with prefix attention read in decoding is what they read in training."""

import random
from itertools import accumulate

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, build_model

from medusa_exp.decode import loop
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits, Responses
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.model import Backbone, build_heads
from medusa_exp.model.heads import heads_input
from medusa_exp.tree import Tree

TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 3)])


def heads_for(backbone, kind="medusa"):
    """Heads whose layer of attention does something; those of medusa say much that is right."""
    heads = build_heads(
        backbone, num_heads=3, num_layers=1, kind=kind, prefix_attention=True
    ).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(heads.prefix.out.weight, std=0.3)
    return heads


class Listener:
    """A drafter that keeps what it is given."""

    def __init__(self, drafter):
        self.drafter, self.heard = drafter, []

    def __getattr__(self, name):
        return getattr(self.drafter, name)

    def __call__(self, root_B, hidden_BD, uniforms_BU=None):
        self.heard += list(zip(root_B.tolist(), hidden_BD.clone(), strict=True))
        return self.drafter(root_B, hidden_BD, uniforms_BU)


@pytest.mark.parametrize("has_fixed_shapes", [False, True])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_each_step_reads_what_the_whole_text_gives(architecture, has_fixed_shapes):
    backbone = Backbone(build_model(architecture))
    heads = heads_for(backbone)
    rng = random.Random(architecture)
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(9)]
    limits = Limits(50)
    [plain] = decode_plain(backbone, [prompt], limits)
    answers = Responses(1, limits)
    decoder = Decoder(backbone, heads, TREE, cuda_graph=has_fixed_shapes)
    listener = Listener(decoder.drafter())

    for _ in decoder.steps([prompt], answers, listener):
        pass

    [answer] = answers.rows
    assert answer.tokens == plain.tokens
    assert len(answer.accept_lengths) < len(plain.accept_lengths)
    text = torch.tensor([prompt + answer.tokens])
    read_TD = heads_input(heads.prefix, backbone.hidden_states(text))[0]
    ends = accumulate(answer.accept_lengths[:-1])  # the last step is heard of no more
    for (root, hidden_D), end in zip(listener.heard, ends, strict=True):
        place = len(prompt) + end - 1
        assert root == text[0, place]
        torch.testing.assert_close(hidden_D, read_TD[place - 1], rtol=1e-3, atol=1e-3)


def test_rows_of_a_batch_read_their_own_texts(backbone, monkeypatch):
    monkeypatch.setattr(loop, "PREFILL_TOKENS", 24)  # prompts in several pieces
    heads = heads_for(backbone, "hydra")
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (3, 17, 30)]
    answers = Responses(3, Limits(30, {7}))
    decoder = Decoder(backbone, heads, TREE)
    listener = Listener(decoder.drafter())

    for _ in decoder.steps(prompts, answers, listener):
        pass

    texts = [torch.tensor([p + a.tokens]) for p, a in zip(prompts, answers.rows, strict=True)]
    read = [heads_input(heads.prefix, backbone.hidden_states(text))[0] for text in texts]
    assert len(listener.heard) > 20
    for root, hidden_D in listener.heard:
        distances = [
            ((read_TD[:-1] - hidden_D).norm(dim=1) + 99 * (text[0, 1:] != root)).min()
            for read_TD, text in zip(read, texts, strict=True)
        ]
        assert min(distances) < 1e-3


def test_documents_of_a_row_do_not_see_each_other(backbone):
    prefix = heads_for(backbone).prefix
    torch.manual_seed(2)
    first_1TD, second_1TD = torch.randn(1, 5, 32), torch.randn(1, 7, 32)
    example_BT = torch.tensor([[1] * 5 + [2] * 7 + [0] * 3])
    row_1TD = torch.cat([first_1TD, second_1TD, torch.zeros(1, 3, 32)], 1)

    packed = heads_input(prefix, row_1TD, example_BT)

    torch.testing.assert_close(packed[:, :5], heads_input(prefix, first_1TD))
    torch.testing.assert_close(packed[:, 5:12], heads_input(prefix, second_1TD))
    assert not torch.allclose(packed[:, :5], first_1TD, atol=0.1)


def test_nothing_later_is_seen(backbone):
    prefix = heads_for(backbone).prefix
    hidden_1TD = torch.randn(1, 8, 32)
    changed = hidden_1TD.clone()
    changed[0, 5] += 1

    before, after = (heads_input(prefix, x)[0] for x in (hidden_1TD, changed))

    assert torch.equal(before[:5], after[:5])
    assert ((before[5:] - after[5:]).abs().amax(1) > 1e-4).all()
