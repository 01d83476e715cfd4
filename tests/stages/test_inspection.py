import json
import zipfile
from pathlib import Path

import pytest
from tiny_models import build_model

from medusa_exp.config import Config, DatasetConfig, InspectConfig, ModelConfig, TokenizerConfig
from medusa_exp.data import Conversation, Message
from medusa_exp.stages import doctor, inspection
from medusa_exp.stages.session import Session


@pytest.fixture
def config(sharegpt_file, tokenizer, tmp_path) -> Config:
    records = json.loads(sharegpt_file.read_text())
    records[3]["conversations"] *= 2
    records.append({"id": "lost", "conversations": []})
    sharegpt_file.write_text(json.dumps(records))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return Config(
        device="cpu",
        cache_dir=str(tmp_path / "cache"),
        dataset=DatasetConfig(path=str(sharegpt_file), val_fraction=0.2, test_fraction=0.2),
        tokenizer=TokenizerConfig(path=str(tmp_path / "tokenizer")),
        inspect=InspectConfig(num_samples=2, num_documents=4),
    )


def test_counts_and_samples_without_a_model(config, tmp_path, capsys):
    metrics = inspection.run(config, tmp_path)
    assert metrics["data/records"] == 41 and metrics["data/kept_records"] == 40
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["sources"]["sharegpt"]["dropped"] == {"no turns": 1}
    assert found["forms"] == {"sharegpt": {"messages": 40}}
    name = f"conversation sums-0 ({config.dataset.path}, record 1)"
    turns = [["user", "What is 0 + 1?"], ["assistant", "0 + 1 = 1."]]
    assert found["first_chat"] == {"name": name, "turns": turns, "num_more": 0}
    roles = found["roles"]["sharegpt"]
    assert roles["assistant"]["trained tokens"] == roles["assistant"]["tokens"] > 0
    assert roles["user"]["trained tokens"] == 0 < roles["user"]["tokens"]
    assert roles["template"]["trained tokens"] == 41  # an end mark a reply
    assert found["checks"] == {
        "runs": 41,
        "runs from edge to edge of a reply": 41,
        "runs that could not be checked": 0,
    }
    assert found["lengths"]["tokens"]["max"] == 2 * found["lengths"]["tokens"]["min"]
    lines = (tmp_path / "data_samples.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 2 and first["runs"] == [
        ["<|user|>What is 0 + 1?<|end|>\n<|assistant|>", False],
        ["0 + 1 = 1.<|end|>", True],
        ["\n", False],
    ]
    shown = capsys.readouterr().out
    assert "\u27e60 + 1 = 1.<|end|>\u27e7" in shown and "dropped: no turns" in shown
    assert "the first chat as it was read" in shown and "of the form messages" in shown
    assert "doctor" not in found


def test_control_characters_are_shown_and_not_obeyed(config, tmp_path, capsys):
    records = json.loads(Path(config.dataset.path).read_text())
    records[0]["conversations"][1]["value"] = "a\x1b[31mb\r\n\u202ec\x9bd\t[e]"
    records[0] |= {"id": "i\x07", "k\x1b": 1}
    Path(config.dataset.path).write_text(json.dumps(records))
    inspection.run(config, tmp_path)
    shown = capsys.readouterr().out
    assert not set("\x1b\r\u202e\x9b\x07") & set(shown)
    for text in (r"a\x1b[31mb\r", r"\u202ec\x9bd", "[e]", r"i\x07", r"key `k\x1b`"):
        assert text in shown
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["first_chat"]["turns"][1][1].startswith("a\x1b[31mb\r\n\u202ec\x9bd")


def test_what_is_passed_over_is_said_once(config, tmp_path, caplog):
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "a.json").write_bytes(Path(config.dataset.path).read_bytes())
    (folder / "none.json").write_text("[]")
    (folder / "notes.txt").write_text("x")
    with zipfile.ZipFile(folder / "b.zip", "w") as archive:
        archive.write(folder / "a.json", "c.json")
        archive.writestr("notes.txt", "x")
    config.dataset.path = str(folder)
    session = Session(config, tmp_path)
    inspection.run(config, tmp_path, session)
    for said in (f"{folder}: 1 files", f"{folder}/b.zip: 1 files", "data: passed over, for it"):
        assert caplog.text.count(said) == 1
    assert [source.reading.look_at for source in session.sources()] == [100]


@pytest.fixture
def model_path(config, tokenizer, tmp_path) -> str:
    model = build_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def findings(config, out):
    inspection.run(config, out)
    found = json.loads((out / "data.json").read_text())
    return {f["name"]: (f["is_fine"], f["sentence"]) for f in found["doctor"]}


def test_the_doctor_finds_a_fitting_pair_well(config, model_path, tmp_path):
    config.model = ModelConfig(path=model_path)
    found = findings(config, tmp_path)
    for name in ("vocabulary", "generation prompt", "BOS", "EOS"):
        assert found[name][0], found[name]
    assert not found["replies"][0] and "far from what it says itself" in found["replies"][1]


def test_the_doctor_finds_what_does_not_fit(config, model_path, tokenizer, tmp_path):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|user|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>think: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config.model = ModelConfig(path=model_path)
    found = findings(config, tmp_path)
    assert found["generation prompt"] == (False, found["generation prompt"][1])
    assert found["generation prompt"][1].startswith("0 of 40 first replies begin where")
    assert not found["EOS"][0] and "set decode.stop_ids=[" in found["EOS"][1]


def test_a_mask_shifted_by_one_is_found(tokenizer):
    chat = Conversation("c", [Message("user", "q"), Message("assistant", "word")])
    (row,) = doctor.sample_rows([("s", chat)], tokenizer)
    edge = "runs from edge to edge of a reply"
    assert doctor.count_runs([row]) == {"runs": 1, edge: 1, "runs that could not be checked": 0}
    mask = row.rendered.is_trained
    original = list(mask)
    users = [role == "user" for role in row.roles]
    for wrong in ([False, *original[:-1]], [*original[1:], False], [True] * len(mask), users):
        mask[:] = wrong
        found = doctor.count_runs([row])
        assert (found["runs"], found[edge]) == (1, 0)


def test_a_run_without_anybodys_words_is_not_called_right(tokenizer):
    chat = Conversation("c", [Message("user", "q"), Message("assistant", "")])
    (row,) = doctor.sample_rows([("s", chat)], tokenizer)
    found = doctor.count_runs([row])
    assert (found["runs"], found["runs that could not be checked"]) == (0, 1)


def test_half_a_surrogate_pair_is_found_as_it_is_rendered(tokenizer):
    chat = Conversation("c", [Message("user", "q"), Message("assistant", "a\ud800b")])
    (row,) = doctor.sample_rows([("s", chat)], tokenizer)
    assert row.roles.count("assistant") > 3
