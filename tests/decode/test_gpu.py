"""What only a CUDA device can show; `nox -s gpu` runs it."""

import pytest
import torch
from tiny_models import build_model

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import chain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_neox"])
def test_equal_to_plain_decoding_on_the_device(architecture):
    backbone = Backbone(build_model(architecture).cuda())
    heads = build_heads(backbone, num_heads=3)
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6]]
    plain = decode_plain(backbone, prompts, Limits(40))
    ours = Decoder(backbone, heads, chain(3)).decode(prompts, Limits(40))
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in plain]
