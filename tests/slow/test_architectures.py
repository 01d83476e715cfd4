"""Greedy trees against `model.generate` on many architectures: `nox -s architectures`.

Tiny random models in float32, four prompts of unequal length in one batch. What cannot be decoded
with trees must be refused, and never be answered wrongly. A version of transformers without an
architecture skips it.
"""

import random

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from medusa_exp import build_heads, generate
from medusa_exp.decode.cache import GrowingCache
from medusa_exp.decode.masks import StepMask
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, attention
from medusa_exp.tree import Tree, chain

V, NEW_TOKENS = 64, 40
LENGTHS = (1, 7, 19, 30)
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {"num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}
WINDOW = {"sliding_window": 12}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
GPT2_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": V}
ROTARY = {**GPT2_LIKE, "rotary_dim": 4}

DECODED = {
    "afmoe": {},
    "apertus": GROUPED,
    "arcee": GROUPED,
    "biogpt": {},
    "bitnet": GROUPED,
    "codegen": ROTARY,
    "cohere": GROUPED,
    "cohere2": {**GROUPED, **WINDOW},
    "ctrl": {},
    "deepseek_v2": {**LATENT, "q_lora_rank": None},
    "deepseek_v3": {**LATENT, "num_key_value_heads": 4, "q_lora_rank": 8},
    "diffllama": GROUPED,
    "doge": {},
    "ernie4_5": WIDE,
    "exaone4": {**GROUPED, **WINDOW, "sliding_window_pattern": 2},
    "falcon": {"alibi": False, "new_decoder_architecture": False},
    "gemma": WIDE,
    "gemma3_text": {**WIDE, **WINDOW, "sliding_window_pattern": 2},
    "glm": WIDE,
    "glm4": WIDE,
    "gpt_bigcode": GPT2_LIKE,
    "gpt_oss": {**WIDE, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": ROTARY,
    "granite": {**GROUPED, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "granitemoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": WIDE,
    "hunyuan_v1_dense": WIDE,
    "jetmoe": {**GROUPED, "num_local_experts": 2, "kv_channels": 8},
    "ministral": {**WIDE, **WINDOW},
    "ministral3": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "nemotron": GROUPED,
    "olmo": GROUPED,
    "olmo3": {**GROUPED, **WINDOW},
    "olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phimoe": {**GROUPED, "num_local_experts": 4},
    "qwen2": {**GROUPED, **WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {**GROUPED, **EXPERTS},
    "qwen3_moe": {**WIDE, **EXPERTS},
    "seed_oss": WIDE,
    "smollm3": {**GROUPED, "no_rope_layer_interval": 2},
    "stablelm": GROUPED,
    "starcoder2": {**GROUPED, **WINDOW},
    "vaultgemma": {**WIDE, **WINDOW},
    "xglm": {},
}
REFUSED = {
    "bamba": {**GROUPED, "mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": True},
    "falcon_h1": {**GROUPED, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {
        **GROUPED,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "jamba": {**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "lfm2": {**GROUPED, "full_attn_idxs": [1, 3]},
    "llama4_text": {**WIDE, "attention_chunk_size": 16, "num_local_experts": 2},
    "mamba": {},
    "minimax": {**WIDE, "num_local_experts": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "openai-gpt": GPT2_LIKE,
    "recurrent_gemma": {},
    "rwkv": {},
}


def build(name: str, changed: dict):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    shape = {key: value for key, value in SHAPE.items() if "n_embd" not in changed or value is None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**shape, **changed})
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError:  # it has no sdpa
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # else it says the same whatever it is asked
    return model.eval()


class Oracle(torch.nn.Module):
    """Guesses what will be said, more often than not, and much else."""

    def __init__(self, answers: list[list[int]]) -> None:
        super().__init__()
        self.pairs = {}
        for answer in answers:
            for first, *rest in zip(answer, answer[1:], answer[2:], answer[3:], strict=False):
                self.pairs.setdefault(first, rest)
        self.generator, self.rng = torch.Generator().manual_seed(0), random.Random(0)

    def forward(self, hidden_BD):
        logits_BKV = torch.randn(len(hidden_BD), 3, V, generator=self.generator)
        for b in range(len(hidden_BD)):
            for k, token in enumerate(self.rng.choice([*self.pairs.values()])):
                logits_BKV[b, k, token] += 5
        return logits_BKV


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", DECODED)
def test_trees_say_what_model_generate_says(name):
    model = build(name, DECODED[name])
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
    tree = Tree.from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [2]])
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*DECODED, "gemma2", "hyperclovax", "cohere2_moe", "phi"])
def test_the_models_logits_follow_from_its_hidden_states(name):
    """Scales, caps and biases included, also where the first rows of the lm_head are zeros."""
    model = build(name, DECODED.get(name, GROUPED if name != "phi" else {}))
    with torch.no_grad():
        model.get_output_embeddings().weight[:9] = 0
        backbone = Backbone(model)
        backbone.check_next_logits()
        ids_1T = torch.arange(11, 31)[None]
        logits_TV = model(ids_1T).logits[0]
        found_TV = backbone.next_logits(backbone.hidden_states(ids_1T)[0])
    torch.testing.assert_close(found_TV, logits_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_trees_cannot_decode_is_refused(name):
    model = build(name, REFUSED[name])
    with pytest.raises(UserError, match=r"cannot be decoded with trees|has layers of|has windows"):
        generate(
            model,
            torch.nn.Identity(),
            torch.tensor([[5, 6, 7]]),
            tree=Tree.from_paths([[0]]),
            max_new_tokens=4,
        )


NOT_GROUPED = {"gpt_oss", "jetmoe", "vaultgemma"}
"""Of the models with groups: those without sdpa (attention sinks, soft-capping), or with groups of
their own making."""
GROUPED_MODELS = {name for name, shape in DECODED.items() if shape.get("num_key_value_heads") == 2}
GROUPED_MODELS = (GROUPED_MODELS | {"gpt_bigcode"}) - NOT_GROUPED


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DECODED)
def test_grouped_attention_finds_what_sdpa_finds(name, monkeypatch):
    """Steps of a batch of unequal rows, over trees and of single tokens, before and in windows."""
    model = build(name, DECODED[name])
    calls = []
    real = attention._fold_mask
    monkeypatch.setattr(attention, "_fold_mask", lambda *a: (calls.append(1), real(*a))[1])
    found, expected = (
        _logits_of_steps(Backbone(model, uses_grouped_attention=used)) for used in (True, False)
    )
    assert len(found) == len(expected) == 8
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.std().item())
    assert bool(calls) == (name in GROUPED_MODELS)


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
