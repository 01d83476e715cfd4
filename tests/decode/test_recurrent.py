"""Chains of draft tokens for models with recurrent layers: what `model.generate` says, always."""

import random

import pytest
import tiny_models
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_exp.decode import rule as rules
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.cuda.launch import LaunchConfig
from medusa_exp.decode.cuda.verify import KernelVerify
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.slots import Request
from medusa_exp.errors import UserError
from medusa_exp.evaluate.near_ties import find_difference
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree, chain

V, NEW_TOKENS = tiny_models.VOCAB_SIZE, 16
SHAPE = {**tiny_models.SHAPE, "num_key_value_heads": 2}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {**LINEAR, "layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
}
PROMPTS = [[5], [9, 4, 31, 7, 22], [*range(3, 22)]]


def build(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SHAPE, **HYBRIDS[name]})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # else it says the same whatever it is asked
    return Backbone(model)


class Oracle(torch.nn.Module):
    """Proposes what will be said next, and at each depth something else by chance."""

    num_heads = 5

    def __init__(self, responses, share=0.7):
        super().__init__()
        self.pairs = {}
        for prompt, response in zip(PROMPTS, responses, strict=True):
            whole = [*prompt, *response]
            for place in range(len(prompt), len(whole)):
                self.pairs[tuple(whole[:place])] = whole[place + 1 : place + 6]
        self.rng, self.share = random.Random(0), share

    def forward(self, hidden_BD):
        logits_BKV = torch.zeros(len(hidden_BD), 5, V)
        for k, token in enumerate(self.rng.choice([*self.pairs.values()])):
            is_right = self.rng.random() < self.share
            logits_BKV[:, k, token if is_right else self.rng.randrange(V)] = 1
        return logits_BKV


def expected(backbone):
    said = []
    for prompt in PROMPTS:
        ids_1T = torch.tensor([prompt])
        output_1T = backbone.model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            pad_token_id=0,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        said.append(output_1T[0, len(prompt) :].tolist())
    return said


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", HYBRIDS)
def test_chains_say_what_model_generate_says(name):
    backbone = build(name)
    said = expected(backbone)
    assert [row.tokens for row in decode_plain(backbone, PROMPTS, Limits(NEW_TOKENS))] == said
    for depth, heads in ((2, Oracle(said)), (5, Oracle(said, 1.0)), (3, Oracle(said, 0.0))):
        decoder = Decoder(backbone, heads, chain(depth), limits=Limits(NEW_TOKENS))
        assert [row.tokens for row in decoder.decode(PROMPTS)] == said
        slots = decoder.slots(2, 64)
        requests = [Request(p, Limits(NEW_TOKENS), tag=n) for n, p in enumerate(PROMPTS)]
        found = {one.request.tag: one.response.tokens for one in slots.decode(requests)}
        assert [found[n] for n in range(len(PROMPTS))] == said


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", HYBRIDS)
def test_kernels_write_each_verdict_where_the_last_one_was(name, shim, monkeypatch):
    """And the root of a step is what the last verdict said: it must not be read too late."""
    kernels = KernelVerify(shim, LaunchConfig(threads=32))
    monkeypatch.setattr(rules, "pick_verify", lambda *given: kernels)
    backbone = build(name)
    said = expected(backbone)
    for depth, heads in ((2, Oracle(said)), (5, Oracle(said, 1.0)), (3, Oracle(said, 0.0))):
        decoder = Decoder(backbone, heads, chain(depth), limits=Limits(NEW_TOKENS))
        assert [row.tokens for row in decoder.decode(PROMPTS)] == said


class Perfect(torch.nn.Module):
    """Proposes a known response, and after so many right tokens wrong ones."""

    num_heads = 4

    def __init__(self, response, num_right):
        super().__init__()
        self.response, self.num_right, self.place = response, num_right, 0

    def forward(self, hidden_BD):
        logits_1KV = torch.zeros(1, 4, V)
        for k in range(4):
            place = self.place + 1 + k
            token = self.response[place] if place < len(self.response) else 0
            logits_1KV[0, k, token if k < self.num_right else (token + 1) % V] = 1
        self.place += 1 + min(self.num_right, 4)
        return logits_1KV


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_right", range(5))
def test_what_is_accepted_is_what_was_right(num_right):
    backbone = build("qwen3_5_text")
    said = expected(backbone)[2]
    decoder = Decoder(backbone, Perfect(said, num_right), chain(4), limits=Limits(NEW_TOKENS))
    [response] = decoder.decode([PROMPTS[2]])
    assert response.tokens == said
    assert response.accept_lengths[1:-1] == [num_right + 1] * (len(response.accept_lengths) - 2)


@pytest.mark.filterwarnings("ignore")
def test_the_check_finds_a_state_that_is_not_taken_back(monkeypatch):
    backbone = build("qwen3_5_text")
    monkeypatch.setattr(
        "medusa_exp.decode.recurrent.StateCache.cut",
        lambda self, length, states: self.set_lengths([length]),
    )
    with pytest.raises(UserError, match="cannot be decoded with chains"):
        check_tree_attention(backbone)


@pytest.mark.filterwarnings("ignore")
def test_what_recurrent_layers_cannot_do_is_refused():
    backbone = build("lfm2")
    heads = build_heads(backbone, num_heads=2)
    with pytest.raises(UserError, match=r"takes chains of draft tokens\. Set tree=chain"):
        Decoder(backbone, heads, Tree.from_paths([[0], [1]])).decode([[5, 6]])
    with pytest.raises(UserError, match=r"set head\.prefix_attention=false"):
        Decoder(backbone, build_heads(backbone, num_heads=2, prefix_attention=True), chain(2))


@pytest.mark.filterwarnings("ignore")
def test_sampled_responses_depend_on_their_seed_alone():
    backbone = build("lfm2")
    heads = build_heads(backbone, num_heads=2)
    rule = AcceptanceRule("sampling", temperature=1.0, seed=3)
    decoder = Decoder(backbone, heads, chain(2), rule)

    def respond(numbers, seed=7):
        seeds = {n: None if seed is None else (seed, n) for n in numbers}
        requests = [Request(PROMPTS[n], Limits(8), seed=seeds[n], tag=n) for n in numbers]
        found = decoder.slots(3, 64).decode(requests)
        return {one.request.tag: one.response.tokens for one in found}

    assert respond([0, 1, 2]) == {**respond([2, 0]), **respond([1])}
    assert respond([0], None) != respond([0], None)  # drawn anew, whatever the rule's seed


@pytest.mark.filterwarnings("ignore")
def test_a_difference_is_measured_with_states_too():
    backbone = build("lfm2")
    plain = expected(backbone)[1]
    other = [*plain[:4], (plain[4] + 1) % V]
    found = find_difference(backbone, PROMPTS[1], plain, other, 3)
    assert found is not None and found.position == 4 and not found.is_near_tie
    assert 0 <= found.noise < 1e-2
