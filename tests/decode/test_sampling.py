"""Sampling over trees: the law of plain sampling, end to end."""

import pytest
import torch
from tiny_models import build_model

from medusa_exp.decode import generate
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree, chain


def test_sampling_hangs_on_the_seed(backbone):
    heads = build_heads(backbone, num_heads=2)
    options = {"tree": chain(2), "max_new_tokens": 20, "temperature": 1.0, "eos_token_id": []}

    def sample(seed):
        ids = torch.tensor([[4, 5], [6, 7]])
        return generate(backbone, heads, ids, seed=seed, **options).sequences

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("medusa", {}),
        ("medusa", {"top_k": 4, "temperature": 0.8}),
        ("medusa", {"top_p": 0.8}),
        ("hydra", {"draft": "sampled", "top_k": 4, "temperature": 0.8}),
    ],
)
def test_sampled_continuations_have_the_law_of_plain_sampling(kind, options):
    """Chi-square over the first three tokens of 20,000 continuations."""
    backbone = Backbone(build_model("llama", vocab_size=5, spread=1.5))
    heads = build_heads(backbone, num_heads=2, kind=kind)
    tree = Tree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0)])
    num, rule = 20_000, AcceptanceRule("sampling", seed=3, **options)
    counts = []
    for decode in (
        lambda prompts: Decoder(backbone, heads, tree, rule).decode(prompts, Limits(3)),
        lambda prompts: decode_plain(backbone, prompts, Limits(3), rule),
    ):
        said = (answer.tokens for answer in decode([[1, 2, 3]] * num))
        codes = [a * 25 + b * 5 + c for a, b, c in said]
        counts.append(torch.bincount(torch.tensor(codes), minlength=125).double())
    ours, plain = counts
    both = ours + plain
    seen = both > 20
    rest = torch.stack([c[~seen].sum() for c in counts])
    ours, plain = torch.cat([ours[seen], rest[:1]]), torch.cat([plain[seen], rest[1:]])
    statistic = ((ours - plain) ** 2 / (ours + plain).clamp(min=1)).sum()
    freedom = int(seen.sum()) - (0 if rest.sum() else 1)
    p_value = 1 - torch.special.gammainc(torch.tensor(freedom / 2), (statistic / 2).float())
    assert p_value > 0.01 and len(ours) > 8
