"""Attention over grouped queries: what sdpa finds, without a copy of the cache."""

import copy
import json
from contextlib import suppress

import pytest
import torch
from tiny_models import VOCAB_SIZE, build_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medusa_exp.config import ModelConfig
from medusa_exp.decode.cache import FixedCache, GrowingCache
from medusa_exp.decode.masks import StepMask
from medusa_exp.model import Backbone, load_backbone
from medusa_exp.model.attention import NAME, few_shapes, grouped_attention, kernels_for
from medusa_exp.model.source import ModelSpec
from medusa_exp.tree import Tree, chain

TREE = Tree.from_paths([[0], [1], [0, 0], [0, 1], [0, 0, 0]])


def layer(groups: int) -> torch.nn.Module:
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    return module


def states(groups=3, rows=2, queries=4, columns=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    mask_B1NK = draw(rows, 1, queries, columns) > 0
    mask_B1NK[..., -1] = True
    query = draw(rows, queries, 2 * groups, 8).transpose(1, 2)  # as a model hands it on
    return query, draw(rows, 2, columns, 8), draw(rows, 2, columns, 4), mask_B1NK


def additive(mask: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


CASES = {
    "boolean": lambda mask: mask,
    "additive": additive,
    "one for all rows": lambda mask: mask[:1],
    "of single heads": lambda mask: mask.repeat(1, 6, 1, 1),
    "none, causal": lambda mask: None,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("queries", [1, 4, 300])
@pytest.mark.parametrize("groups", [1, 3])
def test_finds_what_sdpa_finds(case, queries, groups):
    query, key, value, mask = states(groups, queries=queries, columns=300)
    mask = CASES[case](mask) if groups == 3 or "heads" not in case else None
    for scaling in (None, 0.3):
        given = (layer(groups), query, key, value, mask)
        expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](*given, scaling=scaling)
        found, weights = grouped_attention(*given, scaling=scaling)
        assert weights is None and found.is_contiguous()
        assert found.shape == expected.shape == (2, queries, 2 * groups, 4)
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_as_near_as_sdpa_is(dtype):
    query, key, value, mask = states(dtype=dtype)
    found, _ = grouped_attention(layer(3), query, key, value, additive(mask, dtype))
    exact, _ = grouped_attention(
        layer(3), query.float(), key.float(), value.float(), additive(mask)
    )
    assert found.dtype == dtype and torch.allclose(found.float(), exact, atol=0.02)


def test_what_is_no_step_goes_to_sdpa_as_it_is(monkeypatch):
    query, key, value, mask = states()
    handed_on = []

    def sdpa(module, *given, **options):
        handed_on.append((given[3], options))
        return query, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", sdpa)
    bias = torch.zeros(2, 6, 4, 11)
    for more in ({"dropout": 0.1}, {"position_bias": bias}, {"softcap": 30.0}, {"s_aux": bias}):
        grouped_attention(layer(3), query, key, value, mask, **more)
        given, options = handed_on.pop()
        assert given is mask and more.items() <= options.items()
    grouped_attention(layer(3), query, key, value, mask, s_aux=None, sliding_window=4)
    assert not handed_on


class LargestTensors(TorchDispatchMode):
    """Notes the size of each new tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                is_new = tensor.untyped_storage().data_ptr() not in given
                self.sizes += [tensor.untyped_storage().nbytes()] * is_new
        return result


def wide_model(**changed) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        attn_implementation="sdpa",
        **changed,
    )
    return LlamaForCausalLM(config).eval()


def step_of(backbone: Backbone, cache, tree: Tree, columns: int, rows: int) -> torch.Tensor:
    """Run a step over `columns` cached tokens in each of so many rows; return its logits."""
    mask = StepMask(backbone.model, columns + len(tree))
    lengths = [columns] * rows
    lengths[0] -= 1  # a batch of unequal rows needs a mask for single tokens too
    depths_1N = torch.from_numpy(tree.depths)[None]
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        backbone.forward(torch.randint(0, 64, (rows, columns), generator=generator), cache)
        cache.set_lengths(lengths)
        given = mask.at(lengths, torch.from_numpy(tree.mask)[None], depths_1N)
        tokens_BN = torch.randint(0, 64, (rows, len(tree)), generator=generator)
        positions_BN = torch.tensor(lengths)[:, None] + depths_1N
        with LargestTensors() as backbone.seen:
            logits_BNV, _ = backbone.forward(
                tokens_BN, cache, mask=given, position_ids_BN=positions_BN
            )
    return logits_BNV


@pytest.mark.parametrize("tree", [TREE, chain(0)], ids=["tree", "single tokens"])
@pytest.mark.parametrize("is_fixed", [False, True])
def test_a_step_of_16_rows_makes_no_copy_of_the_cache(tree, is_fixed):
    rows, columns, model = 16, 400, wide_model()
    keys = rows * 2 * columns * 32 * 4  # bytes of one layer's keys
    largest, logits = {}, {}
    for used in (True, False):
        backbone = Backbone(model, uses_grouped_attention=used)
        cache = (
            FixedCache(2, columns, len(tree), rows, torch.device("cpu"))
            if is_fixed
            else GrowingCache(2, columns + len(tree), rows)
        )
        logits[used] = step_of(backbone, cache, tree, columns, rows)
        largest[used] = max(backbone.seen.sizes)
    assert torch.allclose(logits[True], logits[False], atol=1e-5)
    assert largest[True] < keys
    if tree is TREE:  # the measure sees the copies that are no longer made
        assert largest[False] >= 4 * keys


def test_the_model_is_as_it_was_outside_of_a_forward_on_a_cache():
    model = build_model("llama")
    before = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    backbone = Backbone(model)
    seen = []
    hook = backbone.body.register_forward_pre_hook(
        lambda module, _: seen.append(module.config._attn_implementation)
    )
    ids_BT = torch.randint(0, VOCAB_SIZE, (1, 5))
    model(ids_BT)
    backbone.hidden_states(ids_BT)
    assert set(seen) == {"sdpa"}
    seen.clear()
    with torch.inference_mode():
        backbone.forward(ids_BT, GrowingCache(backbone.num_layers, 8, 1))
    with pytest.raises(AssertionError), torch.inference_mode():
        backbone.forward(ids_BT, GrowingCache(backbone.num_layers, 1, 1))
    hook.remove()
    assert seen == [NAME, NAME]
    assert model.config._attn_implementation == "sdpa"
    assert json.dumps(model.config.to_dict(), sort_keys=True, default=str) == before
    assert backbone.identity() == Backbone(copy.deepcopy(model)).identity()


@pytest.mark.parametrize(
    ("architecture", "is_taken"), [("llama", True), ("gemma2", False), ("falcon", False)]
)
def test_only_sdpa_by_the_interface_is_replaced(architecture, is_taken):
    if architecture == "falcon":
        from transformers import FalconConfig, FalconForCausalLM

        shape = {"num_kv_heads": 2, "new_decoder_architecture": True, "vocab_size": 64}
        config = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, **shape)
        model = FalconForCausalLM(config)
    else:
        model = build_model(architecture)
    backbone = Backbone(model)
    seen = []
    backbone.body.register_forward_pre_hook(
        lambda module, _: seen.append(module.config._attn_implementation)
    )
    with torch.inference_mode():
        backbone.forward(torch.tensor([[1, 2, 3]]), GrowingCache(backbone.num_layers, 8, 1))
    assert (seen == [NAME]) == is_taken


@pytest.mark.parametrize(("wanted", "is_used"), [("auto", True), ("sdpa", False)])
def test_who_names_sdpa_gets_transformers_own(tmp_path, wanted, is_used):
    build_model("llama").save_pretrained(tmp_path)
    backbone = load_backbone(ModelSpec(ModelConfig(path=str(tmp_path), attn_implementation=wanted)))
    assert backbone.uses_grouped_attention == is_used


def test_only_few_shapes_are_planned_for():
    is_on, cuda = torch.backends.cuda.cudnn_sdp_enabled, torch.device("cuda")
    assert is_on()
    with suppress(ZeroDivisionError), kernels_for(cuda):
        assert not is_on()
        with kernels_for(cuda):
            assert not is_on()
        assert not is_on()
        raise ZeroDivisionError
    assert is_on()
    with few_shapes(), kernels_for(cuda):
        assert is_on()
    with kernels_for(torch.device("cpu")):
        assert is_on()
    torch.backends.cuda.enable_cudnn_sdp(False)  # somebody's own choice
    try:
        with kernels_for(cuda):
            assert not is_on()
        assert not is_on()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
