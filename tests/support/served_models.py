"""A small Llama that a real engine can serve, and heads that have learnt its answers by heart."""

from dataclasses import dataclass
from pathlib import Path

import torch
from chat_files import TEMPLATE
from exported import export_heads
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.model import Backbone, build_heads, load_heads, save_heads
from medusa_exp.model.heads import heads_input
from medusa_exp.tree import chain

NUM_HEADS, NUM_NEW, LONGEST = 3, 48, 256
PROMPTS = [
    [(7 * n + 11 * place) % 250 + 1 for place in range(length)]
    for n, length in enumerate((5, 23, 9, 70, 14, 6, 41, 12))
]
FAMILIES = {
    "medusa": {"kind": "medusa"},
    "medusa_no_bias": {"kind": "medusa", "bias": False, "num_layers": 2},
    "projections": {"kind": "medusa", "num_layers": 0},
    "tied": {"kind": "medusa_tied", "num_layers": 2},
    "rank": {"kind": "medusa_lowrank", "rank": 64},
    "frequent": {"kind": "medusa_lowrank", "num_tokens": 200},
    "both": {"kind": "medusa_lowrank", "rank": 64, "num_tokens": 200},
    "hydra": {"kind": "hydra", "num_layers": 2},
    "rooted": {"kind": "rooted", "num_tokens": 200},
    "recurrent": {"kind": "recurrent", "num_tokens": 200},
    "medusa_prefix": {"kind": "medusa", "prefix_attention": True},
    "hydra_prefix": {"kind": "hydra", "prefix_attention": True},
}
NATIVE = ("medusa", "medusa_no_bias", "projections", "tied", "rank", "frequent", "both")
"""Families that vLLM's own format can hold, up to its version 0.32."""


def build_target(place: Path, tokenizer, seed: int = 0) -> Backbone:
    """Save a random model of heads as wide as engines can take, whose answers vary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return Backbone(LlamaForCausalLM.from_pretrained(place).eval())


def plain_answers(backbone: Backbone, prompts=PROMPTS, number=NUM_NEW) -> list[list[int]]:
    return [response.tokens for response in decode_plain(backbone, prompts, Limits(number))]


def overfit_heads(backbone: Backbone, place: Path, answers, steps: int = 15, **family):
    """Train heads on five of these answers, so that most of their guesses there are right."""
    torch.manual_seed(0)
    if "num_tokens" in family:
        ids = torch.tensor([token for answer in answers for token in answer])
        family["token_counts"] = torch.bincount(ids, minlength=backbone.vocab_size)
    heads = build_heads(backbone, num_heads=NUM_HEADS, **family)
    rows = [
        (torch.tensor(prompt + answer), len(prompt))
        for prompt, answer in list(zip(PROMPTS, answers, strict=True))[:5]
    ]
    with torch.no_grad():
        states = [backbone.hidden_states(ids[None]) for ids, _ in rows]
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = torch.zeros(())
        for (ids, start), states_1TD in zip(rows, states, strict=True):
            read_TD = heads_input(heads.prefix, states_1TD)[0]
            for k in range(NUM_HEADS):
                at = torch.arange(start - 1, len(ids) - 2 - k)
                drafted = torch.stack([ids[at + 1 + j] for j in range(k + 1)], 1)
                logits = heads.head_logits(k, read_TD[at], drafted)
                loss = loss + cross_entropy(logits, heads.to_head_vocab(ids[at + 2 + k]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_heads(heads, place)
    return load_heads(place, backbone)


def counts_of_chain(backbone: Backbone, heads, number: int = NUM_HEADS) -> dict:
    """Return drafts and accepted draft tokens per position as engines count them.

    They count a response's last step before it is cut: so decode a little more, and count the steps
    that begin before the end. The token of the prompt's own step is no draft's.
    """
    decoder = Decoder(backbone, heads, chain(number))
    per_position, drafts = [0] * number, 0
    for response in decoder.decode(PROMPTS, Limits(NUM_NEW + number)):
        done = 0
        for place, length in enumerate(response.accept_lengths):
            if place and done < NUM_NEW:
                drafts += 1
                for position in range(length - 1):
                    per_position[position] += 1
            done += length
    return {"drafts": drafts, "accepted": per_position}


@dataclass
class ServedModels:
    """What a test of an engine needs."""

    place: Path
    backbone: Backbone
    answers: list[list[int]]
    """Plain greedy answers to PROMPTS."""
    counts: dict[str, dict]
    """By family, what our own decoding of a chain counts."""


def build_served_models(place: Path) -> ServedModels:
    """Build the target, and heads of all families with their exports."""
    backbone = build_target(place / "target", byte_tokenizer())
    answers = plain_answers(backbone)
    counts = {}
    for name, family in FAMILIES.items():
        heads = overfit_heads(backbone, place / name / "heads", answers, **family)
        counts[name] = counts_of_chain(backbone, heads)
        export_heads(place / name / "heads", backbone, place / name / "export")
        if name in NATIVE:
            native = place / name / "native"
            export_heads(place / name / "heads", backbone, native, "vllm_medusa")
    return ServedModels(place, backbone, answers, counts)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte, and one a mark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
    )
