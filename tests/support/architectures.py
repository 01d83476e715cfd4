"""Tiny random models of seventy architectures, and which of them trees can decode."""

import random

import pytest
import tiny_models
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

V, NEW_TOKENS = tiny_models.VOCAB_SIZE, 40
SHAPE = {**tiny_models.SHAPE, "num_hidden_layers": 4}
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
COMMON = {
    "gpt2": GPT2_LIKE,
    "gpt_neox": {},
    "llama": GROUPED,
    "mistral": {**GROUPED, **WINDOW},
    "olmo2": GROUPED,
    "phi3": GROUPED,
    "qwen3": WIDE,
}
"""Decoded too, and in the tests of every day at that."""
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
RECURRENT = {
    "bamba": {**GROUPED, "mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**GROUPED, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "falcon_mamba": {},
    "granitemoehybrid": {
        **GROUPED,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "jamba": {**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "lfm2": {**GROUPED, "full_attn_idxs": [1, 3]},
    "lfm2_moe": {**GROUPED, **EXPERTS, "layer_types": ["conv", "full_attention"] * 2},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "qwen3_5_text": {**WIDE, **LINEAR},
    "qwen3_next": {**WIDE, **EXPERTS, **LINEAR},
}
"""Models with recurrent layers, which take chains."""
SCALED = {"cohere2_moe": GROUPED, "gemma2": GROUPED, "hyperclovax": GROUPED, "phi": {}}
"""More that scale or cap logits, or have a bias."""
REFUSED = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": True},
    "llama4_text": {**WIDE, "attention_chunk_size": 16, "num_local_experts": 2},
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


WHOLE = {
    "llama": GROUPED,
    "mistral": {**GROUPED, **WINDOW},
    "qwen2": DECODED["qwen2"],
    "qwen3": WIDE,
    "gemma3_text": DECODED["gemma3_text"],
    "phi3": {**GROUPED, **WINDOW},
    "olmo": DECODED["olmo"],
    "olmo2": GROUPED,
    "gpt_neox": {},
}
"""Most in use: a layer is compiled without a graph break, once for trees, for single tokens and, of
each of `kinds_of_layers`, for prompts that run together."""


def kinds_of_layers(model) -> int:
    """Return how many kinds of attention its layers have.

    Prompts longer than the window have a mask in its layers, and none in the others.
    """
    return len({*(getattr(model.config, "layer_types", None) or ["all alike"])})


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
