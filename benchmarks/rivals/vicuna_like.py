"""Vicuna's chat form: as a template, as a plain function, and with a tokenizer to go with it."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medusa_exp.data import Conversation

ASSISTANT = "ASSISTANT: "
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_TEMPLATE = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    '{% set turns = messages[1:] %}{% else %}{% set system = "' + _SYSTEM + '" %}'
    "{% set turns = messages %}{% endif %}{{ bos_token + system + ' ' }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_BOS, _EOS = "<s>", "</s>"


def vicuna_text(conversation: Conversation, eos: str) -> str:
    """Render what the template renders, but for BOS."""
    messages = conversation.messages
    has_system = messages[0].role == "system"
    parts = [(messages[0].content if has_system else _SYSTEM) + " "]
    for message in messages[has_system:]:
        is_user = message.role == "user"
        parts.append(
            f"USER: {message.content} " if is_user else f"{ASSISTANT}{message.content}{eos}"
        )
    return "".join(parts)


def train_tokenizer(
    conversations: Iterable[Conversation], vocab_size: int = 8192
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE that puts BOS before texts, as LLaMA's does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BOS, _EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (message.content for c in conversations for message in c.messages)
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, core.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_EOS,
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
