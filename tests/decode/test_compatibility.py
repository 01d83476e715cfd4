"""Which architectures can be decoded with trees: those that heed a mask and positions of ours."""

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, build_longrope, build_model
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_exp.data.batching import epoch_planner
from medusa_exp.data.datamodule import collate
from medusa_exp.data.examples import Example
from medusa_exp.decode import generate
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
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
    backbone = Backbone(build_longrope())
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


def test_prompts_of_both_sides_of_a_longrope_boundary_in_one_batch():
    backbone = Backbone(build_longrope())
    heads = build_heads(backbone, num_heads=2)
    decoder = Decoder(backbone, heads, chain(2), limits=Limits(12))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 64, (n,), generator=generator).tolist() for n in (50, 9, 28, 60)]
    alone = [decode_plain(backbone, [prompt], Limits(12))[0].tokens for prompt in prompts]
    assert [response.tokens for response in decoder.decode(prompts)] == alone
    assert [response.tokens for response in decoder.decode_plain(prompts)] == alone


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_no_batch_has_documents_of_both_sides_of_a_longrope_boundary(batching):
    backbone = Backbone(build_longrope())
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(20, 41, 20), 40, 41, *rng.integers(41, 100, 20)]
    documents = [Example(rng.integers(1, 64, n), np.ones(n, bool)) for n in lengths]
    plan = epoch_planner(batching, lengths, batch_tokens=256, row_tokens=100, seed=0, boundary=40)(
        0
    )
    assert sorted(number for batch in plan for row in batch for number in row) == [*range(42)]
    for rows in plan:
        batch = collate([[documents[n] for n in row] for row in rows], 100, boundary=40)
        with torch.inference_mode():
            found_BTD = backbone.hidden_states(batch.input_ids_BT, batch.positions_BT)
            for row, found_TD in zip(rows, found_BTD, strict=True):
                start = 0
                for number in row:
                    stop = start + lengths[number]
                    ids_1T = torch.from_numpy(documents[number].input_ids)[None]
                    alone_TD = backbone.hidden_states(ids_1T)[0]
                    torch.testing.assert_close(found_TD[start:stop], alone_TD, rtol=1e-3, atol=1e-3)
                    start = stop


def test_a_dynamic_rotary_is_used_as_far_as_it_does_not_stretch():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    rope["original_max_position_embeddings"] = 32
    config = AutoConfig.for_model("llama", **SHAPE, rope_parameters=rope)
    backbone = Backbone(AutoModelForCausalLM.from_config(config))
    assert backbone.rotary_boundary is None
    assert backbone.max_length == backbone.max_length_from(5) == 32
