"""Greedy trees against `model.generate` on many architectures: `nox -s architectures`.

Tiny random models in float32, four prompts of unequal length in one batch. What cannot be decoded
with trees must be refused, and never be answered wrongly. A version of transformers without an
architecture skips it. With MATRIX=DIR each process writes there what it has found, for
`scripts/architecture_matrix.py`.
"""

import json
import os
import random
from pathlib import Path

import pytest
import torch
import transformers
from architectures import (
    COMMON,
    DECODED,
    NEW_TOKENS,
    RECURRENT,
    REFUSED,
    SCALED,
    Oracle,
    V,
    build,
)

from medusa_exp import build_heads, generate
from medusa_exp.decode.cache import GrowingCache
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.recurrent import StateCache
from medusa_exp.errors import UserError
from medusa_exp.evaluate.near_ties import find_difference
from medusa_exp.model import Backbone, attention
from medusa_exp.tree import Tree, chain

LENGTHS = (1, 7, 19, 30)
SHAPES = {**COMMON, **RECURRENT, **SCALED, **DECODED}


@pytest.fixture(scope="module")
def matrix():
    """Gather what was found of each architecture, by its name, and write it at the end."""
    found = {name: {} for name in (*SHAPES, *(label(name) for name in REFUSED))}
    yield found
    if place := os.environ.get("MATRIX"):
        whole = {"transformers": transformers.__version__, "architectures": found}
        file = Path(place) / f"{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}.json"
        file.write_text(json.dumps(whole, indent=2) + "\n")


def label(refused: str) -> str:
    """Name what is refused, by its settings too where others of its family are decoded."""
    with_settings = f"{refused}, {'; '.join(f'{k}={v}' for k, v in REFUSED[refused].items())}"
    return with_settings if refused in SHAPES else refused


@pytest.fixture
def folded(monkeypatch):
    """Count the calls of grouped attention."""
    calls = []
    real = attention._fold_mask
    monkeypatch.setattr(attention, "_fold_mask", lambda *a: (calls.append(1), real(*a))[1])
    return calls


def attention_of(model, folded) -> str:
    if not any(hasattr(layer, "keys") for layer in StateCache(model).layers):
        return "none"
    return "grouped" if folded else model.config._attn_implementation


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", SHAPES)
def test_drafts_say_what_model_generate_says(name, folded, matrix):
    model = build(name, SHAPES[name])
    rng = random.Random(1)
    prompts = [[rng.randrange(3, V) for _ in range(length)] for length in LENGTHS]
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        said = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        expected.append(said[0, len(prompt) :].tolist())
    ids_BT = torch.zeros(len(prompts), max(LENGTHS), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        ids_BT[b, -len(prompt) :] = torch.tensor(prompt)
        mask_BT[b, -len(prompt) :] = 1
    tree = tree_for(name)
    for heads in (build_heads(model, num_heads=3), Oracle(expected)):
        found = generate(
            model,
            heads,
            ids_BT,
            attention_mask=mask_BT,
            tree=tree,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=[],
        )
        assert found.sequences == expected
    drafts = "chains" if name in RECURRENT else "trees"
    matrix[name] |= {"drafts": drafts, "attention": attention_of(model, folded)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_the_models_logits_follow_from_its_hidden_states(name, matrix):
    """Scales, caps and biases included, also where the first rows of the lm_head are zeros."""
    model = build(name, SHAPES[name])
    with torch.no_grad():
        model.get_output_embeddings().weight[:9] = 0
        backbone = Backbone(model)
        backbone.check_next_logits()
        ids_1T = torch.arange(11, 31)[None]
        logits_TV = model(ids_1T).logits[0]
        found_TV = backbone.next_logits(backbone.hidden_states(ids_1T)[0])
        bare_TV = backbone.lm_head(backbone.hidden_states(ids_1T)[0])
    torch.testing.assert_close(found_TV, logits_TV, rtol=1e-4, atol=1e-4)
    matrix[name]["has_own_logits"] = not torch.allclose(bare_TV, logits_TV, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_packed_documents_see_themselves_alone_or_are_refused(name, matrix):
    backbone = Backbone(build(name, SHAPES[name]))
    texts = [torch.arange(11, 11 + length)[None] for length in (6, 9)]
    positions_1T = torch.cat([torch.arange(text.shape[1])[None] for text in texts], 1)
    with torch.no_grad():
        packed_1TD = backbone.hidden_states(torch.cat(texts, 1), positions_1T)
        alone_1TD = torch.cat([backbone.hidden_states(text) for text in texts], 1)
    is_same = torch.allclose(packed_1TD, alone_1TD, rtol=1e-3, atol=1e-3 * alone_1TD.abs().max())
    if is_same:
        backbone.check_packing()
    else:
        with pytest.raises(UserError, match=r"train\.batching=padded"):
            backbone.check_packing()
    matrix[name]["packing"] = is_same


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_trees_cannot_decode_is_refused(name, matrix):
    model = build(name, REFUSED[name])
    expected = r"cannot be decoded with (trees|chains)|has layers of|has windows"
    with pytest.raises(UserError, match=expected) as refusal:
        generate(
            model,
            torch.nn.Identity(),
            torch.tensor([[5, 6, 7]]),
            tree=Tree.from_paths([[0]]),
            max_new_tokens=4,
        )
    matrix[label(name)] |= {"drafts": "refused", "notes": str(refusal.value)}


def random_prompts(number: int) -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(11, V) for _ in range(12)] for _ in range(number)]


def tree_for(name: str) -> Tree:
    forked = Tree.from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [2]])
    return chain(3) if name in RECURRENT else forked


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_in_bfloat16_differences_are_near_ties(name, matrix):
    backbone = Backbone(build(name, SHAPES[name]).to(torch.bfloat16))
    decoder = Decoder(backbone, build_heads(backbone, num_heads=3), tree_for(name))
    limits, differences = Limits(24), 0
    for prompt in random_prompts(4):
        [plain] = decode_plain(backbone, [prompt], limits)
        [ours] = decoder.decode([prompt], limits)
        nodes = len(tree_for(name))
        found = find_difference(backbone, prompt, plain.tokens, ours.tokens, nodes)
        assert found is None or found.is_near_tie, found
        differences += found is not None
    matrix[name]["bfloat16"] = "near ties" if differences else "identical"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_heads_behind_prefix_attention_are_lossless_or_refused(name, matrix):
    backbone = Backbone(build(name, SHAPES[name]))
    heads = build_heads(backbone, num_heads=3, prefix_attention=True)
    limits, prompts = Limits(16), random_prompts(2)
    matrix[name]["prefix_attention"] = name not in RECURRENT
    if name in RECURRENT:
        with pytest.raises(UserError, match=r"head\.prefix_attention=false"):
            Decoder(backbone, heads, tree_for(name))
        return
    found = Decoder(backbone, heads, tree_for(name)).decode(prompts, limits)
    plain = decode_plain(backbone, prompts, limits)
    assert [one.tokens for one in found] == [one.tokens for one in plain]


NOT_GROUPED = {"gpt_oss", "jetmoe", "vaultgemma"}
"""Of the models with groups: those without sdpa (attention sinks, soft-capping), or with groups of
their own making."""
GROUPED_MODELS = {name for name, shape in DECODED.items() if shape.get("num_key_value_heads") == 2}
GROUPED_MODELS = (GROUPED_MODELS | {"gpt_bigcode"}) - NOT_GROUPED


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DECODED)
def test_grouped_attention_finds_what_sdpa_finds(name, folded):
    """Steps of a batch of unequal rows, over trees and of single tokens, before and in windows."""
    model = build(name, DECODED[name])
    found, expected = (
        _logits_of_steps(Backbone(model, uses_grouped_attention=used)) for used in (True, False)
    )
    assert len(found) == len(expected) == 8
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.std().item())
    assert bool(folded) == (name in GROUPED_MODELS)


@torch.inference_mode()
def _logits_of_steps(backbone: Backbone) -> list[torch.Tensor]:
    """Run a prompt, then a tree and a single token in turn, over rows of 1 to 20 tokens."""
    lengths, tree = [1, 4, 9, 20], Tree.from_paths([[0], [1], [0, 0], [0, 1], [0, 0, 0]])
    capacity = max(lengths) + 8 * len(tree)
    cache = GrowingCache(backbone.num_layers, capacity, len(lengths))
    mask = StepMask(backbone.model, capacity)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, V, (len(lengths), max(lengths)), generator=generator)
    backbone.forward(ids_BT, cache)
    cache.set_lengths(lengths)
    found = []
    for shape, path in [(tree, [0, 1, 3]), (chain(0), [0])] * 4:
        depths_1N = torch.from_numpy(shape.depths)[None]
        logits_BNV, _ = backbone.forward(
            torch.randint(3, V, (len(lengths), len(shape)), generator=generator),
            cache,
            mask=mask.at(cache.lengths, torch.from_numpy(shape.mask)[None], depths_1N),
            position_ids_BN=torch.tensor(cache.lengths)[:, None] + depths_1N,
        )
        cache.commit([path] * len(lengths))
        found.append(logits_BNV)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECURRENT)
def test_chains_of_every_length_one_and_three_at_a_time(name):
    backbone = Backbone(build(name, RECURRENT[name]))
    rng = random.Random(2)
    prompts = [[rng.randrange(3, V) for _ in range(rng.randrange(1, 24))] for _ in range(25)]
    limits = Limits(12)
    expected = [response.tokens for response in decode_plain(backbone, prompts, limits)]
    [said] = Decoder(backbone).decode_plain([prompts[0]], limits)
    ids = torch.tensor([prompts[0]])
    whole = backbone.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
    )
    assert said.tokens == expected[0] == whole[0, ids.shape[1] :].tolist()
    for depth in (2, 3, 4, 5):
        heads = build_heads(backbone, num_heads=depth)
        decoder = Decoder(backbone, heads, chain(depth), limits=limits)
        for size in (1, 3):
            batches = [prompts[start : start + size] for start in range(0, 25, size)]
            found = [row.tokens for batch in batches for row in decoder.decode(batch)]
            assert found == expected
