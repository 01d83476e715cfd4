"""The decoder, and `generate`: what is called from Python."""

import numpy as np
import pytest
import torch
from tiny_models import build_model

from medusa_exp import Decoder, build_heads, generate
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone
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


def test_a_model_in_training_is_refused(backbone):
    decoder = Decoder(backbone, build_heads(backbone, num_heads=2), chain(2))
    backbone.model.train()
    with pytest.raises(ValueError, match="in training mode"):
        decoder.generate(IDS, max_new_tokens=4)


def test_a_decoders_limits_are_those_of_a_call_that_names_none(backbone):
    heads = build_heads(backbone, num_heads=2)
    [expected] = decode_plain(backbone, [[4, 5, 6]], Limits(9))
    decoder = Decoder(backbone.model, heads, chain(2), limits=Limits(9))
    assert decoder.generate(IDS).sequences == [expected.tokens]
    assert decoder.generate(IDS, max_new_tokens=3).sequences == [expected.tokens[:3]]
    stop = expected.tokens[4]
    end = expected.tokens.index(stop) + 1
    assert decoder.generate(IDS, eos_token_id=stop).sequences == [expected.tokens[:end]]
    assert [r.tokens for r in decoder.decode_plain([[4, 5, 6]])] == [expected.tokens]


def test_steps_are_streamed_as_text_and_as_tokens(tokenizer):
    backbone = Backbone(build_model("llama", vocab_size=len(tokenizer)))
    heads = build_heads(backbone, num_heads=2)
    decoder = Decoder(backbone, heads, chain(2), limits=Limits(12), tokenizer=tokenizer)
    ids = tokenizer("hello").input_ids
    [plain] = decode_plain(backbone, [ids], Limits(12))
    for prompt in ("hello", ids, torch.tensor([ids]), tokenizer("hello")):
        steps = list(decoder.stream(prompt))
        assert [token for step in steps for token in step.tokens] == plain.tokens
        assert sum(step.num_tokens for step in steps) == 12
        text = tokenizer.decode(plain.tokens, skip_special_tokens=True)
        assert "".join(step.text for step in steps) == text.rstrip("\ufffd")
    mute = Decoder(backbone, heads, chain(2), limits=Limits(12))
    assert {step.text for step in mute.stream(ids)} == {""}
    with pytest.raises(ValueError, match="a prompt of text needs"):
        list(mute.stream("hello"))


def test_a_stream_ends_where_its_caller_says(decoder, tokenizer):
    ids = tokenizer("hello").input_ids
    [plain] = decode_plain(decoder.backbone, [ids], Limits(9))

    def streamed(**options):
        return [token for step in decoder.stream(ids, **options) for token in step.tokens]

    assert streamed(max_new_tokens=9, eos_token_id=-1) == plain.tokens
    end = plain.tokens.index(plain.tokens[2]) + 1
    assert streamed(eos_token_id=[plain.tokens[2]]) == plain.tokens[:end]
    for options, said in (
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be 0 or more"),
        ({"eos_token_id": "</s>"}, r"eos_token_id='</s>' is text: give the id"),
    ):
        with pytest.raises(ValueError, match=said):
            streamed(**options)


def test_a_prompt_that_leaves_too_little_room_says_how_much(decoder):
    most = decoder.backbone.max_length
    with pytest.raises(UserError, match=r"Set max_new_tokens=2 or less \(decode\."):
        list(decoder.stream([5] * (most - 2)))
    assert len([*decoder.stream([5] * (most - 2), max_new_tokens=1)]) == 1
    for length in (most, most + 1):
        with pytest.raises(UserError, match=r"positions for it\. Shorten the prompt\."):
            list(decoder.stream([5] * length, max_new_tokens=1))


@pytest.fixture
def decoder(tokenizer):
    backbone = Backbone(build_model("llama", vocab_size=len(tokenizer)))
    heads = build_heads(backbone, num_heads=2)
    return Decoder(backbone, heads, chain(2), limits=Limits(6), tokenizer=tokenizer)


def test_all_take_the_same_prompts(decoder, tokenizer):
    ids, longer = tokenizer("hello").input_ids, tokenizer("hello, you").input_ids
    first, second = (r.tokens for r in decode_plain(decoder.backbone, [ids, longer], Limits(6)))
    as_tensors = tokenizer("hello", return_tensors="pt")
    tensor, array = torch.tensor(ids), np.array(ids)
    for one in ("hello", ids, tensor, tensor[None], array, tokenizer("hello"), as_tensors):
        assert [token for step in decoder.stream(one) for token in step.tokens] == first
        for prompts in (one, [one]):
            assert [response.tokens for response in decoder.decode(prompts)] == [first]
            assert [response.tokens for response in decoder.decode_plain(prompts)] == [first]
            if prompts is not tensor:  # of a tensor it is [B, T], as transformers has it
                assert decoder.generate(prompts).sequences == [first]
        both = [one, longer]
        assert decoder.generate(both).sequences == [first, second]
        assert [response.tokens for response in decoder.decode(both)] == [first, second]
    assert decoder.generate(**as_tensors).sequences == [first]
    tokenizer.pad_token = tokenizer.eos_token
    for side in ("left", "right"):
        padded = tokenizer(["hello", "hello, you"], padding=True, padding_side=side)
        assert len(padded.input_ids[0]) == len(longer) > len(ids)
        assert decoder.generate(padded).sequences == [first, second]
        assert [response.tokens for response in decoder.decode(padded)] == [first, second]


def test_a_prompt_may_have_ids_that_the_model_cannot_say():
    """Some models have embeddings of tokens that their lm_head has no row for."""
    backbone = Backbone(build_model("llama"))
    backbone.model.get_input_embeddings().weight = torch.nn.Parameter(
        torch.randn(backbone.vocab_size + 5, backbone.hidden_size), requires_grad=False
    )
    decoder = Decoder(backbone, build_heads(backbone, num_heads=2), chain(2), limits=Limits(3))
    prompt = [1, backbone.vocab_size + 4]
    [answer] = decoder.decode_plain([prompt])
    assert max(answer.tokens) < backbone.vocab_size
    generated = decoder.generate(torch.tensor([prompt]))
    assert generated.sequences == [answer.tokens]
    with pytest.raises(UserError, match=f"from 0 to {backbone.num_ids - 1}"):
        decoder.decode_plain([[backbone.num_ids]])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            None,
            "None is no prompt: a prompt is text, a list, array or tensor of token ids, or",
        ),
        ({"text": "hello"}, "is no prompt: a prompt is text"),
        ([1.5], "1.5 is no prompt: a prompt is text"),
        ([4, "hello"], "4 is no prompt: a prompt is text"),
        ([4, -1], "-1 is no token: ids are integers from 0 to"),
        ([100_000], "100000 is no token: ids are integers from 0 to"),
        ([], "the prompt has no token"),
    ],
)
def test_what_is_no_prompt_is_refused_by_all(decoder, prompt, message):
    for call in (decoder.stream, decoder.generate, decoder.decode, decoder.decode_plain):
        with pytest.raises(UserError, match=message):
            list(call(prompt))


def test_several_prompts_are_no_single_one(decoder, tokenizer):
    for prompts in ([[4], [5, 6]], ["a", "b"], tokenizer(["a", "b"])):
        with pytest.raises(UserError, match="2 prompts stand where one is wanted"):
            list(decoder.stream(prompts))
        with pytest.raises(UserError, match="2 prompts stand where one is wanted"):
            decoder.decode([prompts])
    with pytest.raises(UserError, match="attention_mask goes with input_ids as a tensor"):
        decoder.generate([4, 5], attention_mask=[1, 1])
    with pytest.raises(UserError, match="a prompt of text needs"):
        generate(decoder.backbone, decoder.heads, "hello", tree=chain(2), max_new_tokens=2)


def test_a_tree_needs_heads_and_plain_decoding_none(backbone):
    decoder = Decoder(backbone)
    assert len(decoder.decode_plain([[4, 5]], Limits(3))[0].tokens) == 3
    with pytest.raises(ValueError, match="no heads or no tree"):
        decoder.decode([[4, 5]], Limits(3))


def test_wrapping_a_model_leaves_nothing_on_it(backbone):
    heads = build_heads(backbone, num_heads=2, prefix_attention=True)
    before = dict(vars(backbone))
    for cuda_graph in (False, True):
        Decoder(backbone, heads, chain(2), cuda_graph=cuda_graph).decode([[4, 5]], Limits(5))
    assert vars(backbone) == before
