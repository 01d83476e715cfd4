"""Directories of models without weights, tokenizers in them, and how to compare two of these."""

from pathlib import Path

from chat_files import TEMPLATE
from transformers import AutoTokenizer, LlamaConfig, LlamaTokenizer

from medusa_exp.config import ModelConfig, TokenizerConfig
from medusa_exp.model import load_tokenizer, save_tokenizer
from medusa_exp.model.source import ModelSpec

FAST = "PreTrainedTokenizerFast"
CHAT = [{"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": " A <s> b"}]
TEXTS = ["x", "", " Two  words\n", "<|end|> x <|user|>  y", "\u00e9\U0001f600"]


def spec_for(place: Path, **settings) -> ModelSpec:
    return ModelSpec(ModelConfig(path=str(place)), TokenizerConfig(**settings))


def load(place: Path, **settings):
    return load_tokenizer(spec_for(place, **settings))


def write(place: Path, tokenizer, rows: int | None = None) -> Path:
    """Write a model's directory without weights."""
    LlamaConfig(vocab_size=rows or len(tokenizer), hidden_size=32).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def llama_tokenizer() -> LlamaTokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcxyzAB"]
    tokenizer = LlamaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], chat_template=TEMPLATE
    )
    tokenizer.add_bos_token = True
    return tokenizer


def assert_same(one, other):
    for text in TEXTS:
        assert one(text).input_ids == other(text).input_ids, text
        ids = one(text).input_ids
        for skip in (True, False):
            assert one.decode(ids, skip_special_tokens=skip) == other.decode(
                ids, skip_special_tokens=skip
            )
    for name in (
        *("chat_template", "special_tokens_map", "extra_special_tokens", "all_special_tokens"),
        *("padding_side", "truncation_side", "model_max_length", "model_input_names"),
    ):
        assert getattr(one, name) == getattr(other, name), name
    if isinstance(one.chat_template, str):
        prompts = [t.apply_chat_template(CHAT, tokenize=False) for t in (one, other)]
        assert prompts[0] == prompts[1]


def saved(tokenizer, spec: ModelSpec):
    """Save beside heads, and read as any user of transformers would."""
    directory = Path(spec.model.path).parent / "heads"
    save_tokenizer(tokenizer, spec, directory)
    return AutoTokenizer.from_pretrained(directory)
