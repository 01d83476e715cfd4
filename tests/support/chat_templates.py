"""Chat templates of the kinds met in the wild, each with a twin in Python; and small tokenizers."""

# ruff: noqa: E501 (templates read better on one line)

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import msgspec
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from medusa_exp.data import Message

Pieces = list[tuple[str, bool]]
"""Texts that follow each other, and whether each is the assistant's own."""


@dataclass(frozen=True)
class Template:
    source: str
    rows: Callable[..., list[Pieces]]


def one_row(turn: Callable[[Message], Pieces], before: str = "") -> Callable:
    """Return a twin that writes a whole conversation, turn after turn."""
    return lambda messages: [[(before, False), *(p for m in messages for p in turn(m))]]


def said(m: Message, header: str, reply: str, mark: str, rest: str = "") -> Pieces:
    own = m.role == "assistant"
    return [(header, False), (reply, own), (mark, own), (rest, False)]


def reasoning_rows(messages: list[Message]) -> list[Pieces]:
    """As Qwen3: the newest turn has a place for reasoning, which earlier ones lose."""
    rows = []
    for i, newest in enumerate(messages):
        if newest.role == "assistant":
            earlier = [(f"<|{m.role}|>{m.content}<|end|>\n", False) for m in messages[:i]]
            rows.append(
                [*earlier, *said(newest, "<|assistant|>(hm)", newest.content, "<|end|>", "\n")]
            )
    return rows


def marked_end_rows(messages: list[Message]) -> list[Pieces]:
    """As Phi-3: a mark of its own ends the whole."""

    def turn(m: Message) -> Pieces:
        return said(m, f"<|{m.role}|>\n", m.content, "<|end|>", "\n")

    newest = [i for i, m in enumerate(messages) if m.role == "assistant"]
    if newest == [len(messages) - 1]:
        return [[*(p for m in messages for p in turn(m)), ("</s>", False)]]
    rows = []
    for i in newest:
        earlier = [(text, False) for m in messages[:i] for text, _ in turn(m)]
        rows.append([*earlier, *turn(messages[i]), ("</s>", False)])
    return rows


def edited(text: str) -> str:
    return text.replace("a", "bb").replace("\n", " ")


_LOOP = "{% for m in messages %}"
_END = "{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {
    "chatml": Template(
        _LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
        + _END + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        # Here these marks are no tokens of the vocabulary: plain text, trained as such.
        one_row(lambda m: said(m, f"<|im_start|>{m.role}\n", m.content, "<|im_end|>", "\n")),
    ),
    "special marks, stripped": Template(
        _LOOP + "{{ '<|' + m.role + '|>' + m.content | trim + '<|end|>' + '\n\n' }}"
        + _END + "<|assistant|>{% endif %}",
        one_row(lambda m: said(m, f"<|{m.role}|>", m.content.strip(), "<|end|>", "\n\n")),
    ),
    "vicuna": Template(
        "{{ bos_token }}" + _LOOP + "{% if m.role == 'assistant' %}"
        "{{ 'ASSISTANT: ' + m.content + eos_token }}{% else %}{{ 'USER: ' + m.content + ' ' }}{% endif %}"
        + _END + "ASSISTANT:{% endif %}",
        one_row(
            lambda m: said(m, "ASSISTANT: ", m.content, "</s>")
            if m.role == "assistant"
            else [(f"USER: {m.content} ", False)],
            "<s>",
        ),
    ),
    "no header, blank before the mark": Template(
        _LOOP + "{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
        one_row(
            lambda m: said(m, " ", m.content, " </s>")
            if m.role == "assistant"
            else [(f"[INST] {m.content} [/INST]", False)]
        ),
    ),
    "nothing around": Template(
        _LOOP + "{{ m.content }}{% endfor %}", one_row(lambda m: said(m, "", m.content, ""))
    ),
    "lines": Template(
        _LOOP + "{{ m.role + ': ' + m.content + '\n' }}" + _END + "{{ 'assistant: ' }}{% endif %}",
        one_row(lambda m: said(m, f"{m.role}: ", m.content, "", "\n")),
    ),
    "lines, stripped": Template(
        _LOOP + "{{ '\n' + m.role + ': ' + m.content | trim + '\n' }}{% endfor %}",
        one_row(lambda m: said(m, f"\n{m.role}: ", m.content.strip(), "", "\n")),
    ),
    "edited": Template(
        _LOOP + "{{ '<|' + m.role + '|>' + m.content.replace('a', 'bb').replace('\n', ' ') + '<|end|>' }}"
        "{% endfor %}",
        one_row(lambda m: said(m, f"<|{m.role}|>", edited(m.content), "<|end|>")),
    ),
    "reasoning in the newest turn": Template(
        _LOOP + "{{ '<|' + m.role + '|>' }}{% if loop.last and m.role == 'assistant' %}(hm){% endif %}"
        "{{ m.content + '<|end|>' + '\n' }}" + _END + "<|assistant|>{% endif %}",
        reasoning_rows,
    ),
    "mark at the very end": Template(
        _LOOP + "{{ '<|' + m.role + '|>' + '\n' + m.content + '<|end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        marked_end_rows,
    ),
    "generation tags": Template(
        _LOOP + "{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content + '<|end|>' }}"
        "{% endgeneration %}{% else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}"
        + _END + "<|assistant|>{% endif %}",
        one_row(lambda m: said(m, f"<|{m.role}|>", m.content, "<|end|>")),
    ),
    "generation tags without the mark": Template(
        _LOOP + "{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}"
        "{% endgeneration %}<|end|>{% else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}"
        + _END + "<|assistant|>{% endif %}",
        one_row(lambda m: said(m, f"<|{m.role}|>", m.content, "<|end|>")),
    ),
    "generation tags around everything": Template(
        "{% generation %}" + _LOOP + "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% endgeneration %}",
        one_row(lambda m: said(m, f"<|{m.role}|>", m.content, "<|end|>")),
    ),
}  # fmt: skip


def _own(m: Message) -> str:
    """What an assistant's turn has between its header and its mark: reasoning, reply, calls."""
    calls = json.loads(m.fields)["tool_calls"] if m.fields else []
    called = [
        f"<call>{json.dumps(c['function']['arguments'], ensure_ascii=False)}</call>" for c in calls
    ]
    return (f"<think>{m.reasoning}</think>" if m.reasoning else "") + m.content + "".join(called)


def _turns(messages: list[Message], bare: set[int]) -> Pieces:
    pieces = []
    for i, m in enumerate(messages):
        text = m.content if i in bare or m.role != "assistant" else _own(m)
        pieces += [(f"<|{m.role}|>", False), (text, m.role == "assistant" and m.is_trained)]
        pieces += [("<|end|>", m.role == "assistant" and m.is_trained)]
    return pieces


def _tools(tools: str) -> Pieces:
    return (
        [(f"<|system|>{json.dumps(json.loads(tools), ensure_ascii=False)}<|end|>", False)]
        if tools
        else []
    )


def thinking_rows(messages: list[Message], tools: str) -> list[Pieces]:
    return [[*_tools(tools), *_turns(messages, set())]]


def last_thinking_rows(messages: list[Message], tools: str) -> list[Pieces]:
    """Reasoning of the newest turn alone, as it is served; in one row, if no other has any."""
    replies = [i for i, m in enumerate(messages) if m.role == "assistant"]
    ends = [i for i in replies if messages[i].reasoning and i + 1 < len(messages)]
    if not ends:
        earlier = {i for i in replies if i + 1 < len(messages)}
        return [[*_tools(tools), *_turns(messages, earlier)]]
    rows = []
    for i in replies:
        if messages[i].is_trained:
            untrained = [msgspec.structs.replace(m, is_trained=False) for m in messages[:i]]
            bare = set(range(i))
            rows.append([*_tools(tools), *_turns([*untrained, messages[i]], bare)])
    return rows


def unthinking_rows(messages: list[Message], tools: str) -> list[Pieces]:
    return [_turns(messages, set(range(len(messages))))]


_THINK = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
_CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.arguments | tojson }}</call>{% endfor %}"
)
_TOOLS = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
FULL_TEMPLATES = {
    "thinking": Template(
        _TOOLS + _LOOP + "<|{{ m.role }}|>" + _THINK + "{{ m.content }}" + _CALLS + "<|end|>"
        + _END + "<|assistant|>{% endif %}",
        thinking_rows,
    ),
    "thinking, tagged": Template(
        _TOOLS + _LOOP + "<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}" + _THINK
        + "{{ m.content }}" + _CALLS + "<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>"
        "{% endif %}" + _END + "<|assistant|>{% endif %}",
        thinking_rows,
    ),
    "thinking in the newest turn": Template(
        _TOOLS + _LOOP + "<|{{ m.role }}|>{% if loop.last %}" + _THINK + "{% endif %}{{ m.content }}"
        "<|end|>" + _END + "<|assistant|>{% endif %}",
        last_thinking_rows,
    ),
    "unthinking": Template(
        _LOOP + "<|{{ m.role }}|>{{ m.content }}<|end|>" + _END + "<|assistant|>{% endif %}",
        unthinking_rows,
    ),
}  # fmt: skip
"""Templates that read more than role and content; their twins take the tools too."""

_SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_CORPUS = [
    "hello I am a user",
    "ASSISTANT: I am USER: hello",
    "[INST] 1 + 1 = 2 [/INST]",
    "(hm)a",
] * 4
TOKENIZERS = ("bytes", "bytes, trimmed offsets", "metaspace", "normalised", "swallowing")


@cache
def _backend(kind: str) -> Tokenizer:
    """Train a tokenizer of a few hundred entries, with merges across blanks and role headers."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "metaspace"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "metaspace":  # as Llama: a blank before the text, unknown characters as bytes
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        alphabet = []
        core.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=kind != "bytes"
        )
        core.decoder = decoders.ByteLevel()
    if kind == "normalised":
        core.normalizer = normalizers.NFKC()
    if kind == "bytes, trimmed offsets":
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "metaspace" else []
    core.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=[*(_SPECIAL[:3] if kind == "swallowing" else _SPECIAL), *fallback],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return core


@cache
def build_tokenizer(kind: str, template: str) -> PreTrainedTokenizerFast:
    marks: list = _SPECIAL[3:]
    if kind == "swallowing":  # as Phi-3: its marks take the blanks behind them along
        marks = [AddedToken(mark, rstrip=True, special=True) for mark in marks]
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(kind),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=marks,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
