"""What several tests need: a tiny random backbone, a tokenizer, a ShareGPT file."""

import json
from pathlib import Path

import pytest
from hypothesis import settings
from tiny_models import build_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_exp.model import Backbone

# A shared machine says nothing about how long an example takes. `nox -s masks` asks for thorough.
settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("quick")


@pytest.fixture
def backbone() -> Backbone:
    return Backbone(build_model("llama"))


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token a byte, and one a mark."""
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


def conversation_record(number: int) -> dict:
    """Return a ShareGPT record."""
    return {
        "id": f"sums-{number}",
        "conversations": [
            {"from": "human", "value": f"What is {number} + 1?"},
            {"from": "gpt", "value": f"{number} + 1 = {number + 1}."},
        ],
    }


@pytest.fixture
def sharegpt_file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([conversation_record(i) for i in range(40)]))
    return path
