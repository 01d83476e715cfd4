"""Conversations in, a tokenizer with role marks and a chat template out."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from medusa_exp.data.conversations import Conversation

_END = "<|end|>"
_ROLE_MARKS = ["<|system|>", "<|user|>", "<|assistant|>"]
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{% endif -%}
"""


def train_tokenizer(conversations: list[Conversation], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the text of conversations, with role marks as special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END, *_ROLE_MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message.content for c in conversations for message in c.messages)
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=_END,
        pad_token=_END,
        extra_special_tokens=_ROLE_MARKS,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
