import pytest

from medusa_exp.data import Conversation, DataError, Message, render
from medusa_exp.data.rendering import check_chat_template


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


def test_a_template_that_renders_a_turn_differently_later(tokenizer):
    """Qwen3 drops earlier reasoning: then every turn is a row, as it is served."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if loop.last and m.role == 'assistant' %}(think) {% endif %}{{ m.content }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = render(chat(("u", "q"), ("a", "x"), ("u", "r"), ("a", "y")), tokenizer)
    assert [trained(row, tokenizer) for row in rows] == ["(think) x<|end|>", "(think) y<|end|>"]


def test_a_template_that_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"conversation c: .* roles must alternate"):
        render(chat(("u", "q"), ("a", "x")), tokenizer)


def test_a_template_whose_answer_does_not_follow_its_prompt(tokenizer):
    tokenizer.chat_template = "{% if add_generation_prompt %}Z{% endif %}{{ messages | length }}"
    with pytest.raises(DataError, match="where the answer starts"):
        render(chat(("u", "q"), ("a", "x")), tokenizer)


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


def test_without_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="tokenizer in DIR has no chat template"):
        check_chat_template(tokenizer, "DIR")
