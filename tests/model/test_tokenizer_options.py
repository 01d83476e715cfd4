"""Special tokens, those around a text, and the chat template."""

from pathlib import Path

import pytest
from chat_files import TEMPLATE
from tiny_tokenizers import (
    CHAT,
    FAST,
    TEXTS,
    assert_same,
    llama_tokenizer,
    load,
    saved,
    spec_for,
    write,
)
from tokenizers import AddedToken
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from medusa_exp.errors import UserError
from medusa_exp.model import load_tokenizer

# BOS and EOS around a text.


def post_processors():
    bos = TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "<s>:1", "$B:1"], special_tokens=[("<s>", 260)]
    )
    byte_level = ByteLevel(trim_offsets=True)
    return {"none": None, "byte level": byte_level, "bos": bos, "both": Sequence([byte_level, bos])}


@pytest.mark.parametrize("add_eos", [None, True, False])
@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("before", ["none", "byte level", "bos", "both"])
def test_bos_and_eos(tmp_path, tokenizer, before, add_bos, add_eos):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if post_processors()[before] is not None:
        tokenizer.backend_tokenizer.post_processor = post_processors()[before]
    place = write(tmp_path / "model", tokenizer)
    spec = spec_for(place, add_bos_token=add_bos, add_eos_token=add_eos)
    changed = load_tokenizer(spec)
    has_bos = before in ("bos", "both") if add_bos is None else add_bos
    expected = ["<s>"] * has_bos + ["x"] + ["<|end|>"] * bool(add_eos)
    assert changed("x").tokens() == expected
    assert changed("x", add_special_tokens=False).tokens() == ["x"]
    offsets = {"return_offsets_mapping": True, "add_special_tokens": False}
    for text in TEXTS:  # these the byte-level post-processor sees to
        assert changed(text, **offsets) == tokenizer(text, **offsets)
    assert_same(changed, saved(changed, spec))


@pytest.mark.parametrize("tokenizer_class", ["auto", FAST])
def test_bos_and_eos_of_a_class_that_builds_its_own(lowercasing, tokenizer_class):
    spec = spec_for(lowercasing, tokenizer_class=tokenizer_class, add_eos_token=True)
    tokenizer = load_tokenizer(spec)
    assert tokenizer("x").tokens() == ["<s>", "\u2581", "x", "</s>"]
    assert_same(tokenizer, saved(tokenizer, spec))
    bare = load(lowercasing, tokenizer_class=tokenizer_class, add_bos_token=False)
    assert bare("x").tokens() == ["\u2581", "x"]


def test_bos_of_a_class_that_sets_its_own_post_processor(tmp_path, tokenizer):
    place = write(tmp_path / "model", tokenizer, rows=300)
    spec = spec_for(place, tokenizer_class="GPTNeoXTokenizer", add_bos_token=True)
    tokenizer = load_tokenizer(spec)
    assert tokenizer("x").tokens() == [tokenizer.bos_token, "x"]
    assert_same(tokenizer, saved(tokenizer, spec))


def test_no_bos_to_add(place):
    with pytest.raises(UserError, match=r"add_bos_token=true.*set tokenizer\.special_tokens\.bos_"):
        load(place, add_bos_token=True)
    assert load(place, add_bos_token=False)("x").tokens() == ["x"]


@pytest.fixture
def framed(tmp_path, tokenizer) -> Path:
    """A tokenizer that puts something else than BOS before a text."""
    tokenizer.add_special_tokens({"bos_token": "<s>", "cls_token": "<cls>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=["<cls>", "$A"], pair=["<cls>", "$A", "$B:1"], special_tokens=[("<cls>", 261)]
    )
    return write(tmp_path / "model", tokenizer)


def test_what_stands_before_texts_is_not_bos(framed):
    with pytest.raises(UserError, match=r"add_bos_token=true: .*\['<cls>'\] before .* cannot be"):
        load(framed, add_bos_token=True)
    changed = load(framed, special_tokens={"pad_token": "<s>"})
    assert changed("x").tokens() == ["<cls>", "x"]


def test_a_bos_that_the_backend_cannot_add(roomy):
    with pytest.raises(UserError, match=r"tokenizer\.add_bos_token=true: .* cannot do this"):
        load(roomy, add_bos_token=True, special_tokens={"bos_token": "<s:x>"})


# Special tokens.


def test_special_tokens(roomy):
    settings = {
        "special_tokens": {"pad_token": "<|pad|>", "eos_token": "<|user|>"},
        "additional_special_tokens": ["<|tool|>", "<|assistant|>"],
    }
    spec = spec_for(roomy, **settings)
    tokenizer = load_tokenizer(spec)
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id == 260
    assert tokenizer.eos_token == "<|user|>" and len(tokenizer) == 262
    assert tokenizer.extra_special_tokens == ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    ids = tokenizer("a<|tool|>b").input_ids
    assert len(ids) == 3 and tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert_same(tokenizer, saved(tokenizer, spec))


def test_a_renamed_bos_stands_where_the_old_one_stood(tmp_path):
    place = write(tmp_path / "model", llama_tokenizer(), rows=300)
    spec = spec_for(place, special_tokens={"bos_token": "<new>"})
    tokenizer = load_tokenizer(spec)
    assert tokenizer("x").tokens() == ["<new>", "\u2581", "x"]
    assert_same(tokenizer, saved(tokenizer, spec))


def test_a_token_that_is_there_keeps_its_ways(tmp_path, tokenizer):
    tokenizer.add_tokens([AddedToken("<|stop|>", rstrip=True, normalized=False)])
    place = write(tmp_path / "model", tokenizer)
    changed = load(place, special_tokens={"eos_token": "<|stop|>"})
    assert len(changed("a<|stop|>  b").input_ids) == 3
    assert "<|stop|>" in changed.all_special_tokens
    text = changed.decode(changed("a<|stop|>b").input_ids, skip_special_tokens=True)
    assert text == "ab"


def test_added_tokens_that_do_not_fit(place):
    with pytest.raises(UserError, match=r"261 entries.* only 260: no row for '<\|pad\|>'\."):
        load(place, special_tokens={"pad_token": "<|pad|>"})


# The chat template.

OTHER = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("given", ["text", "name", "file"])
def test_a_chat_template(tmp_path, tokenizer, given, monkeypatch):
    tokenizer.chat_template = {"default": TEMPLATE, "tools": OTHER}
    place = write(tmp_path / "model", tokenizer)
    (tmp_path / "other.jinja").write_text(OTHER)
    monkeypatch.chdir(tmp_path)
    wanted = {"text": OTHER, "name": "tools", "file": "other.jinja"}[given]
    spec = spec_for(place, chat_template=wanted)
    changed = load_tokenizer(spec)
    assert changed.apply_chat_template(CHAT[:1], tokenize=False) == "[user] Hi  there\n"
    assert_same(changed, saved(changed, spec))
    assert (tmp_path / "heads" / "chat_template.jinja").read_text() == OTHER
    assert not (tmp_path / "heads" / "chat_templates").exists()


def test_the_name_of_the_only_template(place):
    assert load(place, chat_template="default").chat_template == TEMPLATE


def test_several_templates_are_kept_where_none_is_chosen(tmp_path, tokenizer):
    tokenizer.chat_template = {"default": TEMPLATE, "tools": OTHER}
    spec = spec_for(write(tmp_path / "model", tokenizer))
    for _ in range(2):  # the second one replaces the files of the first
        assert_same(load_tokenizer(spec), saved(load_tokenizer(spec), spec))


def test_several_templates_and_no_default(tmp_path, tokenizer):
    tokenizer.chat_template = {"rag": TEMPLATE, "tools": OTHER}
    place = write(tmp_path / "model", tokenizer)
    with pytest.raises(UserError, match="the chat templates rag, tools and none of them is the"):
        load(place)
    assert load(place, chat_template="rag").chat_template == TEMPLATE


def test_a_template_that_cannot_be_found(place, tmp_path):
    with pytest.raises(UserError) as caught:
        load(place, chat_template="vicuna")
    for part in ("tokenizer.chat_template=vicuna", "no {{", "ships default", "No such file"):
        assert part in str(caught.value)
    assert str(Path("vicuna").absolute()) in str(caught.value)
    with pytest.raises(UserError, match="nor a file that can be read"):
        load(place, chat_template="word " * 200)
    (tmp_path / "utf16").write_bytes(OTHER.encode("utf-16"))
    with pytest.raises(UserError, match="nor a file that can be read"):
        load(place, chat_template=str(tmp_path / "utf16"))
    (tmp_path / "prose").write_text("no template")
    with pytest.raises(UserError, match="is no Jinja template"):
        load(place, chat_template=str(tmp_path / "prose"))


def test_a_template_that_does_not_compile(place):
    with pytest.raises(UserError, match=r"chat_template=\{% if %.* does not compile: line 1: "):
        load(place, chat_template="{% if %}")
    (place / "chat_template.jinja").write_text("line\n{% for m in messages %}")
    with pytest.raises(UserError, match=r"the one in .*model does not compile: line 2: "):
        load(place)


def test_the_tags_of_transformers_compile(place):
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert load(place, chat_template=text).chat_template == text
