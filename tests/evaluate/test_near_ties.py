import pytest
import torch
from tiny_models import build_model

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.evaluate.near_ties import find_difference
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree

PROMPT = [3, 1, 4, 1, 5]


def test_same_answers_have_no_difference(backbone):
    assert find_difference(backbone, PROMPT, [1, 2], [1, 2], 4) is None


def test_a_wrong_token_is_no_near_tie(backbone):
    [plain] = decode_plain(backbone, [PROMPT], Limits(8))
    wrong = [*plain.tokens[:5], (plain.tokens[5] + 1) % 64, 0, 0]
    found = find_difference(backbone, PROMPT, plain.tokens, wrong, 4)
    assert found.position == 5 and not found.is_near_tie
    assert found.margin > 100 * found.noise


def test_an_answer_that_stops_early_is_no_near_tie(backbone):
    found = find_difference(backbone, PROMPT, [1, 2, 3], [1, 2], 4)
    assert found.position == 2 and not found.is_near_tie


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_in_bfloat16_every_difference_is_a_near_tie(architecture):
    backbone = Backbone(build_model(architecture, dtype=torch.bfloat16))
    heads = build_heads(backbone, num_heads=3)
    tree = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        prompt = torch.randint(1, 64, (12,), generator=generator).tolist()
        [plain] = decode_plain(backbone, [prompt], Limits(40))
        [ours] = Decoder(backbone, heads, tree).decode([prompt], Limits(40))
        found = find_difference(backbone, prompt, plain.tokens, ours.tokens, len(tree))
        assert found is None or found.is_near_tie, found
