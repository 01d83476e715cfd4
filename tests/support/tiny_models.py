"""Tiny random backbones of several architectures."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 64

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 12},
    "gpt_neox": {},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "phi": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12},
    "olmo2": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 12},
}


class FixedHeads(nn.Module):
    """Heads that say the same everywhere."""

    def __init__(self, logits_KV):
        super().__init__()
        self.logits_KV = logits_KV

    def forward(self, hidden_BD):
        return self.logits_KV.expand(len(hidden_BD), -1, -1)


def build_model(
    architecture: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = VOCAB_SIZE,
    spread: float = 8,
):
    """Build a random causal LM whose outputs vary: weights far larger than at initialisation."""
    torch.manual_seed(seed)
    shape = {**SHAPE, "vocab_size": vocab_size}
    if architecture == "gpt2":
        shape = {key: shape[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(architecture, **shape, **ARCHITECTURES[architecture])
    attention = "eager" if architecture == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return _spread_out(model, spread).to(dtype).eval()


def build_longrope():
    """Build a Phi-3 whose positions turn differently from length 41 on."""
    half = 4  # of the head size
    config = AutoConfig.for_model(
        "phi3",
        **SHAPE,
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
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return _spread_out(model, 8).eval()


def _spread_out(model, spread: float):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(spread)
    return model
