"""Which architectures can be decoded with trees: those that heed a mask and positions of ours."""

import pytest
import torch
from tiny_models import ARCHITECTURES, build_model
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_exp.decode import generate
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits, decode_plain
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import chain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_works_passes(architecture, dtype, monkeypatch):
    backbone = Backbone(build_model(architecture, dtype=dtype))
    check_tree_attention(backbone)
    monkeypatch.setattr(Backbone, "forward", None)
    check_tree_attention(Backbone(backbone.model))  # a model is asked once


SHAPE = {"vocab_size": 64, "hidden_size": 32, "bos_token_id": None, "eos_token_id": None}
REFUSED = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
    "mamba": {"num_hidden_layers": 2, "state_size": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", REFUSED)
def test_what_cannot_work_is_refused(architecture):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SHAPE, **REFUSED[architecture]})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    heads = torch.nn.Identity()  # never asked
    # Versions of transformers differ in which of the reasons an architecture meets first.
    reason = "cannot be decoded with trees|a tree of guesses needs|windows that count rows"
    with pytest.raises(UserError, match=reason):
        generate(model, heads, torch.tensor([[1, 2]]), tree=chain(2), max_new_tokens=5)


def test_an_encoder_decoder_is_refused():
    config = AutoConfig.for_model(
        "t5", vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16
    )
    from transformers import T5ForConditionalGeneration

    with pytest.raises(UserError, match="no decoder-only language model"):
        Backbone(T5ForConditionalGeneration(config))


def test_longrope_stays_on_one_side_of_its_boundary():
    """Phi-3's positions turn differently once a sequence passes the length of pre-training."""
    half = 4  # of the head size
    config = AutoConfig.for_model(
        "phi3",
        **SHAPE,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=None,
        max_position_embeddings=128,
        original_max_position_embeddings=40,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * half,
            "long_factor": [4.0] * half,
            "original_max_position_embeddings": 40,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    backbone = Backbone(model)
    heads = build_heads(backbone, num_heads=4)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        for length, new_tokens in ((20, 20), (50, 20)):
            prompt = torch.randint(1, 64, (length,), generator=generator).tolist()
            [plain] = decode_plain(backbone, [prompt], Limits(new_tokens))
            [ours] = Decoder(backbone, heads, chain(4)).decode([prompt], Limits(new_tokens))
            assert ours.tokens == plain.tokens
    with pytest.raises(UserError, match="40 positions for it"):
        decode_plain(backbone, [[1] * 20], Limits(21))
