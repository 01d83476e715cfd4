import json

import pytest
from sessions import session_of

from medusa_exp.config import Config
from medusa_exp.data import DataError
from medusa_exp.errors import UserError
from medusa_exp.stages.evaluate import load_prompts

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Hi", "And then?"], "reference": []},
    {"question_id": 82, "category": "math", "turns": ["1+1?"]},
    {"question_id": 83, "category": "math", "turns": ["2+2?", "Why?"]},
]


def config_of(path, num_prompts=10) -> Config:
    config = Config()
    config.evaluate.path, config.evaluate.num_prompts = str(path), num_prompts
    config.decode.max_new_tokens = 16
    return config


def load(config, tokenizer, said="ok", max_positions=400):
    ids = tokenizer(said + "<|end|>", add_special_tokens=False).input_ids
    return load_prompts(session_of(config), tokenizer, max_positions, lambda prompt: ids)


@pytest.fixture
def question_file(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    return path


def test_later_turns_follow_the_models_own_answers(question_file, tokenizer):
    prompts = load(config_of(question_file), tokenizer)
    assert [p.prompt_id for p in prompts] == ["81#0", "81#1", "82#0", "83#0", "83#1"]
    assert [p.category for p in prompts] == ["writing"] * 2 + ["math"] * 3
    assert prompts[1].text == (
        "<|user|>Hi<|end|>\n<|assistant|>ok<|end|>\n<|user|>And then?<|end|>\n<|assistant|>"
    )
    assert tokenizer.decode(prompts[1].input_ids) == prompts[1].text


def test_few_prompts_are_spread_over_the_file(question_file, tokenizer):
    prompts = load(config_of(question_file, 3), tokenizer)
    assert [p.prompt_id for p in prompts] == ["81#0", "81#1", "83#0", "83#1"]


def test_plain_text_is_a_question_a_line(tmp_path, tokenizer):
    path = tmp_path / "ask.txt"
    path.write_text("\ufeffWho?\n\n  What?  \n", encoding="utf-8")
    assert [(p.prompt_id, p.text) for p in load(config_of(path), tokenizer)] == [
        ("1#0", "<|user|>Who?<|end|>\n<|assistant|>"),
        ("3#0", "<|user|>What?<|end|>\n<|assistant|>"),
    ]


def test_marks_inside_of_a_line_do_not_end_a_question(tmp_path, tokenizer):
    path = tmp_path / "ask.txt"
    path.write_bytes("one\u2028and\x0ctwo\r\nthree\n".encode())
    prompts = load(config_of(path), tokenizer)
    assert [p.prompt_id for p in prompts] == ["1#0", "2#0"]
    assert "one\u2028and\x0ctwo<|end|>" in prompts[0].text


def test_plain_text_of_another_encoding(tmp_path, tokenizer):
    (tmp_path / "ask.txt").write_bytes("Qu\u00e9?\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"ask\.txt is not UTF-8 text"):
        load(config_of(tmp_path / "ask.txt"), tokenizer)


def test_questions_behind_a_byte_order_mark(tmp_path, tokenizer):
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8-sig")
    assert len(load(config_of(path), tokenizer)) == 5


def test_chats_are_asked_at_every_assistant_turn(sharegpt_file, tokenizer):
    prompts = load(config_of(sharegpt_file), tokenizer)
    assert len(prompts) == 10
    assert prompts[0].text == "<|user|>What is 0 + 1?<|end|>\n<|assistant|>"


def test_questions_without_room_are_counted(question_file, tokenizer, caplog):
    prompts = load(config_of(question_file), tokenizer, said="long " * 8, max_positions=60)
    assert [p.prompt_id for p in prompts] == ["81#0", "82#0", "83#0"]
    assert "prompts left out: 2 (more than 44 tokens)" in caplog.text
    with pytest.raises(UserError, match="no question leaves room"):
        load(config_of(question_file), tokenizer, max_positions=17)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.jsonl", '{"question_id": 1, "turns": ["a"]}\n{"question_id": 2}\n', "line 2 is no que"),
        ("q.jsonl", '{"question_id": 1, "turns": []}\n', "line 1 .* turns is empty"),
        ("q.txt", "\n \n", "holds no question"),
    ],
)
def test_what_is_no_question(tmp_path, tokenizer, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load(config_of(tmp_path / name), tokenizer)


def test_chats_that_are_all_dropped_are_told_of(tmp_path, tokenizer, caplog):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"conversations": [{"from": "human", "value": 3}]}\n')
    with pytest.raises(UserError, match="no held-out prompt is left") as caught:
        load(config_of(path), tokenizer)
    assert "evaluate.path: dropped: " in caplog.text
    example = f"{path}, record 1 (line 1): it is 3 in a turn of role user: write it as text"
    why = f"Dropped of 1 records: content is not text: 1 (as {example})."
    assert str(caught.value).endswith(why) and "max_length" not in str(caught.value)


def test_a_file_of_chats_is_read_as_the_data_set_is(tmp_path, tokenizer):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"q": "Hi", "a": "Hello"}\n' * 2 + '{"q": "Hi"}\n')
    config = config_of(path)
    config.dataset.columns = {"user": "q", "assistant": "a"}
    assert len(load(config, tokenizer)) == 2
    config.dataset.strict = True
    with pytest.raises(DataError, match=r"record 3 .*its keys are q"):
        load(config, tokenizer)


def test_a_file_that_is_not_there(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"evaluate\.path=.*none.jsonl does not exist"):
        load(config_of(tmp_path / "none.jsonl"), tokenizer)
