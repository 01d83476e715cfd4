import pytest
from tokenizers import AddedToken, normalizers, processors
from transformers import PreTrainedTokenizerFast

from medusa_exp.data import Conversation, DataError, Message, render
from medusa_exp.data.rendering import Renderer
from medusa_exp.data.template import ChatTemplate


def chat(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return Conversation("c", [Message(roles[role], text) for role, text in turns])


def trained(rendered, tokenizer):
    ids = [i for i, t in zip(rendered.input_ids, rendered.is_trained, strict=True) if t]
    return tokenizer.decode(ids)


def test_the_assistants_words_and_its_end_mark(tokenizer):
    (row,) = render(chat(("s", "S"), ("u", "one"), ("a", "two"), ("u", "3"), ("a", "4")), tokenizer)
    assert trained(row, tokenizer) == "two<|end|>4<|end|>"
    assert tokenizer.decode(row.input_ids) == row.text


def test_an_answer_that_quotes_the_user(tokenizer):
    """Looking for the answer's text would find the user's."""
    (row,) = render(chat(("u", "say hi"), ("a", "say hi")), tokenizer)
    assert trained(row, tokenizer) == "say hi<|end|>"
    assert row.is_trained.index(True) == 1 + row.input_ids.index(
        tokenizer.convert_tokens_to_ids("<|assistant|>")
    )


def test_markers_inside_a_turn(tokenizer):
    text = "a <|assistant|>b<|end|> c"
    (row,) = render(chat(("u", text), ("a", text), ("u", text)), tokenizer)
    assert trained(row, tokenizer) == text + "<|end|>"


def test_a_template_that_renders_a_turn_differently_later(tokenizer, caplog):
    """Qwen3 drops earlier reasoning: then every turn is a row, as it is served."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if loop.last and m.role == 'assistant' %}(think) {% endif %}{{ m.content }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = render(chat(("u", "q"), ("a", "x"), ("u", "r"), ("a", "y")), tokenizer)
    assert [trained(row, tokenizer) for row in rows] == ["x<|end|>", "y<|end|>"]
    assert [row.text.count("(think)") for row in rows] == [1, 1]
    assert "row of its own" in caplog.text


def test_a_template_that_takes_replies_apart(tokenizer):
    """Qwen3 writes reasoning, if there is any, in its own form: then all of it is the reply."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if '</think>' in m.content %}"
        "[{{ m.content.split('</think>')[0] }}]{{ m.content.split('</think>')[1] }}"
        "{% else %}[]{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (row,) = render(chat(("u", "q"), ("a", "so</think>x"), ("u", "q"), ("a", "y")), tokenizer)
    assert trained(row, tokenizer) == "[so]x<|end|>y<|end|>"


def test_a_template_that_hides_replies(tokenizer):
    tokenizer.chat_template = "{% if add_generation_prompt %}Z{% endif %}{{ messages | length }}"
    with pytest.raises(DataError, match=r"conversation c: .* shows no assistant turn"):
        render(chat(("u", "q"), ("a", "x")), tokenizer)


def test_a_template_that_hides_where_a_reply_begins(tokenizer):
    tokenizer.chat_template = (
        "{{ messages | map(attribute='content') | join | length }}:"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(DataError, match="where the reply starts cannot be told"):
        render(chat(("u", "x"), ("a", "x")), tokenizer)


def test_a_template_that_leaves_out_a_first_greeting(tokenizer, caplog):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not loop.first or m.role == 'user' %}"
        "<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    (row,) = render(chat(("a", "welcome"), ("u", "q"), ("a", "x")), tokenizer)
    assert trained(row, tokenizer) == "x<|end|>"
    assert "leaves out some assistant turns" in caplog.text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 'a' + 1 }}", "concatenate"),
        ("{{ messages | nothing }}", "No filter named"),
    ],
)
def test_a_template_that_raises(tokenizer, template, words):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"conversation c: the chat template says: .*{words}"):
        render(chat(("u", "q"), ("a", "x")), tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% generation %}{% for m in messages %}{{ m.role[0] + m.content }}<|end|>{% endfor %}"
        "{% endgeneration %}",
        "{% for m in messages %}{% if m.role == 'user' %}{% generation %}u{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}a{{ m.content }}<|end|>{% endif %}{% endfor %}",
    ],
    ids=["everything", "the user"],
)
def test_wrong_generation_tags_are_ignored_and_said(tokenizer, caplog, template):
    tokenizer.chat_template = template
    (row,) = render(chat(("u", "q"), ("a", "x"), ("u", "r"), ("a", "y")), tokenizer)
    assert trained(row, tokenizer) == "x<|end|>y<|end|>"
    assert "tags do not mark each reply" in caplog.text


def test_generation_tags_where_the_assistant_begins(tokenizer):
    tokenizer.chat_template = (
        "{{ messages[0].role }}{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    (row,) = render(chat(("a", "welcome"), ("u", "q"), ("a", "x")), tokenizer)
    assert trained(row, tokenizer) == "welcome<|end|>x<|end|>"


def test_a_template_that_leaves_out_empty_turns(tokenizer, caplog):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
        "{% endfor %}"
    )
    (row,) = render(chat(("u", "q"), ("a", ""), ("u", "r"), ("a", "x")), tokenizer)
    assert trained(row, tokenizer) == "x<|end|>"
    assert "leaves out empty assistant turns" in caplog.text


def test_what_a_template_leaves_out_is_said(tokenizer, caplog):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|{{ m.role }}|>"
        "{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    messages = [Message("user", "q"), Message("assistant", "call")]
    messages += [Message("tool", "42"), Message("assistant", "It is 42")]
    render(Conversation("c", messages), tokenizer)
    assert "leaves out what the tool says" in caplog.text


def test_replies_that_do_not_follow_the_generation_prompt_are_said(tokenizer, caplog):
    """DeepSeek-R1's prompt begins the reasoning, which no reply in a conversation shows."""
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}"
    )
    (row,) = render(chat(("u", "q"), ("a", "x")), tokenizer)
    assert trained(row, tokenizer) == "x<|end|>"
    assert "replies do not follow the generation prompt" in caplog.text


def test_marks_that_take_blanks_along(tokenizer):
    """Phi-3's do: their offsets reach into what follows."""
    from tokenizers import AddedToken

    marks = [AddedToken(m, rstrip=True, special=True) for m in ("<|assistant|>", "<|end|>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    (row,) = render(chat(("u", "q"), ("a", " x "), ("u", "r")), tokenizer)
    ids = [i for i, t in zip(row.input_ids, row.is_trained, strict=True) if t]
    assert tokenizer.convert_ids_to_tokens(ids) == ["x", "\u0120", "<|end|>"]


def test_a_long_conversation_of_single_rows_stops_at_the_limit(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ '!' if loop.last }}<|end|>"
        "{% endfor %}"
    )
    long = chat(*[("u", "question"), ("a", "answer")] * 50)
    [rows] = Renderer(tokenizer, max_length=100).render_many([long])
    assert [any(row.is_trained) for row in rows] == [True] * 5 + [False] * 45
    assert max(len(row.input_ids) for row in rows) == 100
    assert not any(row.input_ids for row in rows[6:])
    assert rows[5].num_cut_off > 0


def test_generation_tags_widen_what_is_trained(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}(hm)"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (row,) = render(chat(("u", "q"), ("a", "x"), ("u", "r"), ("a", "y")), tokenizer)
    assert trained(row, tokenizer) == "(hm)x<|end|>(hm)y<|end|>"


@pytest.mark.parametrize("template", ["{{ bos_token }}", ""], ids=["template", "tokenizer"])
def test_bos_stands_once_whoever_writes_it(tokenizer, template):
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template + tokenizer.chat_template
    (row,) = render(chat(("u", "q"), ("a", "x")), tokenizer)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1 and row.text.startswith("<s><|user|>")
    assert trained(row, tokenizer) == "x<|end|>"
    assert ChatTemplate(tokenizer).prompt([Message("user", "q")]).count("<s>") == 1


def test_half_a_surrogate_pair_is_rendered_as_a_replacement_character(tokenizer):
    (row,) = render(chat(("u", "q"), ("a", "a\ud800b")), tokenizer)
    assert trained(row, tokenizer) == "a\ufffdb<|end|>"


def test_many_at_once_are_as_one_by_one(tokenizer):
    good, other = chat(("u", "q"), ("a", "x")), chat(("u", "long" * 50), ("a", " y "))
    bad = Conversation("bad", [Message("user", "alone")])
    first, error, second = Renderer(tokenizer).render_many([good, bad, other])
    assert first == render(good, tokenizer) and second == render(other, tokenizer)
    assert isinstance(error, DataError) and "conversation bad" in str(error)


def test_a_token_across_the_edge_belongs_where_it_ends(tokenizer):
    """With the merge "]x" the reply's first letter shares a token with the header."""
    from tokenizers import AddedToken

    tokenizer.chat_template = "[{{ messages[0].content }}]{{ messages[1].content }}|"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]"
        "{% else %}{{ m.content }}|{% endif %}{% endfor %}"
    )
    tokenizer.add_tokens([AddedToken("]x", normalized=False), AddedToken("z|[", normalized=False)])
    (row,) = render(chat(("u", "q"), ("a", "xyz"), ("u", "r")), tokenizer)
    assert trained(row, tokenizer) == "]xy"  # "z|[" ends in the user's turn


def test_a_mark_that_takes_blanks_and_is_written_otherwise(tokenizer):
    """Found after normalising, its own words do not stand in the text."""
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Lowercase()
    core.add_tokens([AddedToken("<|fin|>", rstrip=True, normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]<|FIN|>  {% endfor %}"
    (row,) = render(chat(("u", "q"), ("a", "x")), tokenizer)
    assert row.is_trained == [False] * 5 + [True] * 3  # x, ], and the mark


def test_rendering_without_a_template_says_so(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="tokenizer in memory has no chat template"):
        render(chat(("u", "q"), ("a", "x")), tokenizer)


@pytest.mark.parametrize("is_written", [True, False])
def test_a_bos_that_somebody_quotes(tokenizer, is_written):
    """A template without a BOS gets one in front, whatever the first message begins with."""
    core = tokenizer.backend_tokenizer
    core.add_special_tokens([AddedToken("<s>", special=True)])
    core.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|end|>")
    bos = "{{ bos_token }}" if is_written else ""
    tokenizer.chat_template = bos + "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    (row,) = render(chat(("u", "<s>q"), ("a", "<s>x")), tokenizer)
    assert row.text == "<s><s>q<|end|><s>x<|end|>"
    assert trained(row, tokenizer) == "<s>x<|end|>"
    (row,) = render(chat(("u", "q"), ("a", "x")), tokenizer)
    assert row.text == "<s>q<|end|>x<|end|>"
