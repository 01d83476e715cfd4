"""Arguments of `generate`."""

import math

import pytest
import torch

from medusa_exp.decode import generate
from medusa_exp.model import build_heads
from medusa_exp.tree import chain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be"),
        ({"temperature": math.nan}, "temperature=nan must be"),
        ({"temperature": math.inf}, "temperature=inf must be"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be"),
        ({"attention_mask": torch.ones(2, 2)}, r"attention_mask .* \[2, 3\], not \[2, 2\]"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask .* \[2, 3\], not \[1, 3\]"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, r"input_ids .* \[0, 3\]"),
    ],
)
def test_what_cannot_be_asked(backbone, options, message):
    heads = build_heads(backbone, num_heads=2)
    arguments = {"input_ids": torch.ones(2, 3, dtype=torch.long), "max_new_tokens": 4, **options}
    with pytest.raises(ValueError, match=message):
        generate(backbone, heads, tree=chain(2), **arguments)
