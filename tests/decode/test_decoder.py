"""The one function to call from Python."""

import pytest
import torch

from medusa_exp import build_heads, generate
from medusa_exp.decode.loop import Limits, decode_plain
from medusa_exp.tree import Tree, chain

IDS = torch.tensor([[4, 5, 6]])


def test_generate_takes_padding_on_either_side(backbone):
    heads = build_heads(backbone, num_heads=2)
    expected = [a.tokens for a in decode_plain(backbone, [[4, 5, 6], [7]], Limits(6))]
    for ids, mask in (
        ([[4, 5, 6], [7, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
        ([[4, 5, 6], [0, 0, 7]], [[1, 1, 1], [0, 0, 1]]),
    ):
        result = generate(
            backbone.model,
            heads,
            torch.tensor(ids),
            tree=chain(2),
            attention_mask=torch.tensor(mask),
            max_new_tokens=6,
            eos_token_id=[],
        )
        assert result.sequences == expected
        assert [sum(lengths) for lengths in result.accept_lengths] == [6, 6]
        assert result.num_steps == max(len(lengths) for lengths in result.accept_lengths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids must be \[B, T\], not of shape \[3\]"),
        ({"input_ids": IDS[:0]}, r"input_ids must be \[B, T\], not of shape \[0, 3\]"),
        ({"input_ids": IDS - 5}, "input_ids must be integers from 0 to"),
        ({"input_ids": IDS + 1000}, "input_ids must be integers from 0 to"),
        ({"input_ids": IDS.float()}, "input_ids must be integers from 0 to"),
        ({"attention_mask": torch.ones(1, 2)}, "attention_mask must be of input_ids' shape"),
        ({"attention_mask": torch.zeros(1, 3)}, "the prompt has no token"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be 0 or more"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 must lie between 0 and 1"),
        ({"tree": Tree.from_paths([[1000]])}, "guess 1001 of a head"),
        ({"tree": chain(3)}, "the tree is 3 guesses deep, and there are 2 heads"),
        ({"heads": torch.nn.Identity()}, r"heads\(hidden_BD\) must return \[B, K, V\]"),
    ],
)
def test_an_argument_that_has_no_such_value_is_refused(backbone, arguments, message):
    heads = build_heads(backbone, num_heads=2)
    given = {"heads": heads, "input_ids": IDS, "tree": chain(2), "max_new_tokens": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        generate(backbone.model, **given)
