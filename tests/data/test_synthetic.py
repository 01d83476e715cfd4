import hashlib
import json
import re
from itertools import islice, pairwise

import pytest

from medusa_exp.data.synthetic import CATEGORIES, FORMAT, generate_conversations, write_dataset

RECORDS = list(generate_conversations(1500, seed=3))
EXCHANGES = [
    (record["conversations"][i]["value"], record["conversations"][i + 1]["value"])
    for record in RECORDS
    for i in range(len(record["conversations"]) - 1)
    if record["conversations"][i]["from"] == "human"
]
ANSWERS = [answer for _, answer in EXCHANGES]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def found(pattern: str) -> list[tuple[str, str, re.Match[str]]]:
    """Return (question, answer, match in the answer); fails where no answer matches."""
    hits = [(q, a, m) for q, a in EXCHANGES if (m := re.search(pattern, a, re.DOTALL))]
    assert len(hits) > 20, pattern
    return hits


def test_a_record_hangs_on_the_seed_and_its_number_alone():
    assert list(islice(generate_conversations(10**9, seed=3), 50)) == RECORDS[:50]
    assert next(generate_conversations(1, seed=4)) != RECORDS[0]


def test_the_form_is_sharegpt():
    assert len({record["id"] for record in RECORDS}) == len(RECORDS)
    for record in RECORDS:
        roles = [turn["from"] for turn in record["conversations"]]
        exchanges = roles[roles[0] == "system" :]
        assert exchanges == ["human", "gpt"] * (len(exchanges) // 2)
        assert 1 <= len(exchanges) // 2 <= 4
        assert all(turn["value"].strip() for turn in record["conversations"])
    systems = sum(record["conversations"][0]["from"] == "system" for record in RECORDS)
    assert systems == pytest.approx(len(RECORDS) / 6, rel=0.25)


def test_every_family_is_there():
    families = {record["id"].rpartition("-")[0] for record in RECORDS}
    assert families == set(CATEGORIES) and len(CATEGORIES) >= 6


def test_answers_vary_and_copy_no_question():
    assert len(set(ANSWERS)) > 0.75 * len(ANSWERS)
    assert not any(question in answer for question, answer in EXCHANGES)


def test_every_sum_is_right():
    checked = 0
    for answer in ANSWERS:
        for left, result in re.findall(r"(\d+(?: [-+x] \d+)+) = (\d+)", answer):
            assert eval(left.replace("x", "*")) == int(result), answer
            checked += 1
    assert checked > 1000


def test_stories_add_up():
    for question, answer, _ in found(r"starts with"):
        start = int(re.search(r" has (\d+) ", question)[1])
        for sign, number in re.findall(r"(gives|loses|sells|buys|finds|gets) (\d+)", question):
            start += -int(number) if sign in ("gives", "loses", "sells") else int(number)
        assert int(re.findall(r"\d+", answer.split("\n\n")[2])[0]) == start


def test_weekdays_are_right():
    for question, _, match in found(r"So the day is (?:a )?(\w+)\."):
        day = next(day for day in DAYS if day in question)
        days = int(re.search(r"\d+", question)[0])
        assert DAYS[(DAYS.index(day) + days) % 7] == match[1]


def test_sequences_go_on_by_their_rule():
    for question, _, match in found(r"continues with (\d+), (\d+) and (\d+)"):
        terms = [int(n) for n in re.findall(r"\d+", question.split("...")[0])]
        terms += [int(n) for n in match.groups()]
        differences = {b - a for a, b in pairwise(terms)}
        ratios = {b / a for a, b in pairwise(terms)}
        assert len(differences) == 1 or ratios == {2.0}


def test_programs_run_and_return_what_they_say():
    for _, answer, match in found(r"```python\n(def .*?)\n```"):
        scope: dict = {}
        exec(compile(match[1], "answer", "exec"), scope)
        call = re.search(r"`(\w+\(.*?\))` returns `(.*?)`", answer)
        if call:
            assert str(eval(call[1], scope)) == call[2]


def test_json_is_json_and_says_what_was_asked():
    for question, _, match in found(r"```json\n(.*?)\n```"):
        value = json.loads(match[1])
        assert all(str(value[key]) in question for key in ("name", "age", "city", "job"))
        assert all(item in question for item in value["likes"])


def test_tables_are_rectangular():
    for _, _, match in found(r"(\| Item .*?\|)\n\n"):
        assert {line.count("|") for line in match[1].splitlines()} == {5}


def test_words_are_sorted_and_counted():
    for _, _, match in found(r"alphabetical order:\n\n(.*?)\n\n"):
        words = re.findall(r"[a-z]+", match[1])
        assert len(words) == 4 and words == sorted(words)
    for _, _, match in found(r'The word "(\w+)" is spelled ([A-Z-]+)\..* has (\d+) letters'):
        assert match[2].replace("-", "").lower() == match[1] and len(match[1]) == int(match[3])


def test_written_whole_under_its_final_name(tmp_path):
    write_dataset(tmp_path / "chat.json", 30, seed=3)
    assert json.loads((tmp_path / "chat.json").read_text()) == RECORDS[:30]
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_a_change_of_what_is_generated_has_a_new_format():
    """Else cached data sets, and the models trained on them, would be taken for the new ones."""
    records = json.dumps(list(generate_conversations(300, 0))).encode()
    assert (FORMAT, hashlib.sha256(records).hexdigest()[:16]) == (1, "1865764ddea52655")
