"""Tables of chats, whatever types their columns have: Parquet, Arrow, CSV."""

import datetime
import decimal
import io
import json
import uuid

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_files import RECORDS, arrow_stream, gzipped, parquet, write

from medusa_exp.data import DataError, columnar, contents, read_conversations
from medusa_exp.data.chat_files import find_files
from medusa_exp.data.columnar import rows_of_batch

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def as_parquet(table):
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def as_arrow(table, is_stream=False, compression=None):
    sink, options = io.BytesIO(), pa.ipc.IpcWriteOptions(compression=compression)
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with new(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def with_field(values):
    """Return a table of one chat, each turn of which has another field."""
    texts = [pa.array([turn[key] for turn in TURNS]) for key in ("role", "content")]
    turns = pa.StructArray.from_arrays([*texts, values], names=["role", "content", "at"])
    return pa.table({"messages": pa.ListArray.from_arrays([0, 2], turns)})


def stored(values, kind, width=64):
    return pa.array(values, pa.int64() if width == 64 else pa.int32()).view(kind)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (stored([10**12, 0], pa.timestamp("s")), [10**12, "1970-01-01T00:00:00"]),
        (
            stored([1, 1500], pa.timestamp("ns")),
            ["1970-01-01T00:00:00", "1970-01-01T00:00:00.000001"],
        ),
        (stored([0, None], pa.timestamp("ns", "UTC")), ["1970-01-01T00:00:00Z", None]),
        (stored([0, 1], pa.timestamp("us", "No/Where")), [0, 1]),
        (stored([5000, 0], pa.duration("ns")), ["PT0.000005S", "P0D"]),
        (stored([2**62, 0], pa.duration("s")), [2**62, "P0D"]),
        (stored([1001, 0], pa.time64("ns")), ["00:00:00.000001", "00:00:00"]),
        (stored([2**30, 0], pa.date32(), 32), [2**30, "1970-01-01"]),
        (stored([10**17, 0], pa.date64()), [10**17, "1970-01-01"]),
        (pa.array([b"\xff", None]), ["/w==", None]),
        (pa.array([decimal.Decimal("1.5"), None]), ["1.5", None]),
        (pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())), [[["a", 1]], []]),
        (pa.array([uuid.UUID(int=5).bytes] * 2, pa.uuid()), [str(uuid.UUID(int=5))] * 2),
        (
            pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], names=["a", "a"]),
            [{"a": 3}, {"a": 4}],
        ),
        (
            pa.DictionaryArray.from_arrays([0, 0], stored([0], pa.timestamp("ns"))),
            ["1970-01-01T00:00:00"] * 2,
        ),
        (
            pa.array([[[0]], []], pa.large_list(pa.list_(pa.timestamp("ns"), 1))),
            [[["1970-01-01T00:00:00"]], []],
        ),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_fields_that_are_not_read_do_no_harm(tmp_path, values, expected):
    table = with_field(values)
    (row,) = rows_of_batch(table.to_batches()[0])
    turns = [{**turn, "at": at} for turn, at in zip(TURNS, expected, strict=True)]
    assert msgspec.json.decode(msgspec.json.encode(row)) == {"messages": turns}
    (found,) = read_conversations(write(tmp_path / "a", as_parquet(table)))
    assert [(m.role, m.content) for m in found.messages] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
    ]
    assert found.id.startswith("sha256-")


def test_moments_that_python_knows_count_in_ids_as_ever(tmp_path):
    at = [datetime.datetime(2024, 1, 1, 12, 30, 0, 5)] * 2
    rows = [{"messages": [{**turn, "at": at[0]} for turn in TURNS]}]
    ids = set()
    for unit in ("us", "ns"):
        path = write(tmp_path / unit, as_parquet(with_field(pa.array(at, pa.timestamp(unit)))))
        ids |= {chat.id for chat in read_conversations(path)}
    path = write(tmp_path / "a.json", msgspec.json.encode(rows))
    assert ids == {chat.id for chat in read_conversations(path)}


def test_columns_that_earlier_runs_did_not_read_do_not_count_in_ids(tmp_path):
    row = {"question": "Which?", "answer": "The first."}
    beside = {"choices": ["The first.", "The second."], "tools": None, "images": []}
    ids = set()
    for name, more in (("a", {}), ("b", beside)):
        (found,) = read_conversations(write(tmp_path / name, parquet([{**row, **more}])))
        ids.add(found.id)
    assert len(ids) == 1


def test_tools_and_calls_of_a_table_are_json(tmp_path):
    """Whatever types they have: templates get them as JSON."""
    tools = [{"name": "f", "since": datetime.date(2024, 1, 1), "blob": b"\xff"}]
    arguments = pa.map_(pa.string(), pa.string())
    call = pa.list_(pa.struct([("name", pa.string()), ("arguments", arguments)]))
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", call)])
    turns = [TURNS[0], {**TURNS[1], "tool_calls": [{"name": "f", "arguments": [("x", "1")]}]}]
    table = pa.table({"messages": pa.array([turns], pa.list_(turn)), "tools": pa.array([tools])})
    (found,) = read_conversations(write(tmp_path / "a", as_parquet(table)))
    assert json.loads(found.tools)[0]["function"]["since"] == "2024-01-01"
    (made,) = json.loads(found.messages[1].fields)["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": {"x": "1"}}


def test_turns_that_are_maps(tmp_path):
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    table = pa.table({"messages": pa.array([[[*turn.items()] for turn in TURNS]], kind)})
    (found,) = read_conversations(write(tmp_path / "a", as_parquet(table)))
    assert [message.content for message in found.messages] == ["Hi", "Hello"]


def saved(folder, *parts, listed=None):
    """Write a folder as `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(parts):05}.arrow" for number in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        write(folder / name, arrow_stream(rows))
    files = [{"filename": name} for name in listed or names]
    write(folder / "state.json", json.dumps({"_data_files": files, "_fingerprint": "0"}))
    write(folder / "dataset_info.json", json.dumps({"features": {"id": {"dtype": "string"}}}))
    return folder


def test_a_folder_that_datasets_has_saved(tmp_path, caplog):
    folder = saved(tmp_path / "set", RECORDS[:3], RECORDS[3:])
    write(folder / "cache-1b2c.arrow", arrow_stream(RECORDS))
    write(folder / "data-00000-of-00001.arrow", arrow_stream(RECORDS))  # of an earlier saving
    assert [chat.id for chat in read_conversations(folder)] == [one["id"] for one in RECORDS]
    assert (
        f"{folder}: 4 files passed over: cache-1b2c.arrow, data-00000-of-00001.arrow, "
        "dataset_info.json, state.json" in caplog.text
    )
    assert "no known form" not in caplog.text
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(
        DataError, match=r"state\.json lists data-00001-of-00002\.arrow, which is not"
    ):
        read_conversations(folder)


@pytest.mark.parametrize("state", [b'{"x": "\xe9"}', b"[" * 100_000, b"{}"])
def test_a_state_that_no_library_wrote_says_nothing_of_the_files_beside_it(tmp_path, state):
    folder = saved(tmp_path / "set", RECORDS)
    write(folder / "state.json", state)
    assert len(find_files(folder)) == 1


def test_the_splits_that_datasets_has_saved(tmp_path, caplog):
    for split, rows in (("train", RECORDS[:3]), ("test", RECORDS[3:])):
        saved(tmp_path / "all" / split, rows)
    write(tmp_path / "all/dataset_dict.json", '{"splits": ["train", "test"]}')
    assert len(list(read_conversations(tmp_path / "all"))) == 5
    assert "chats are read from its splits test, train; of one alone" in caplog.text
    assert "5 files passed over: dataset_dict.json" in caplog.text
    assert len(list(read_conversations(tmp_path / "all/train"))) == 3


def test_a_folder_named_as_the_hubs_that_is_a_saved_one(tmp_path):
    folder = saved(tmp_path / "set", RECORDS)
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=rf"read by dataset=sharegpt dataset\.path={folder}"):
        list(read_conversations(f"hub:{folder}"))


@pytest.mark.parametrize("kind", ["string", "dictionary", "string_view"])
def test_values_that_rows_share(tmp_path, monkeypatch, kind):
    """They are read row by row: as Python objects, each would have a copy."""
    sizes = []
    monkeypatch.setattr(
        columnar, "rows_of_batch", lambda batch: sizes.append(len(batch)) or rows_of_batch(batch)
    )
    texts = pa.array(["Hi", "Hello"] * 300)
    shared = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
    data = as_arrow(pa.table({"prompt": texts, "completion": shared}))
    found = list(read_conversations(write(tmp_path / "a.feather", data)))
    assert [chat.messages[1].content for chat in found] == ["Hi", "Hello"] * 300
    assert sizes == ([256, 256, 88] if kind == "string" else [1] * 600)


@pytest.mark.parametrize("write_table", [as_arrow, as_parquet])
def test_two_columns_of_one_name(tmp_path, write_table):
    table = pa.Table.from_arrays([pa.array(["Hi"])] * 3, ["prompt", "completion", "prompt"])
    data = write_table(table)
    with pytest.raises(DataError, match="two of its columns are called prompt"):
        list(read_conversations(write(tmp_path / "a", data)))


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_shared", [False, True], ids=["", "dictionary"])
def test_arrow_that_expands(tmp_path, monkeypatch, is_stream, is_shared):
    answers = pa.array([f"{number}" + "x" * 50_000 for number in range(100)])
    answers = answers.dictionary_encode() if is_shared else answers
    table = pa.table({"prompt": ["q"] * 100, "completion": answers})
    path = write(tmp_path / "a.arrow", as_arrow(table, is_stream, "zstd"))
    assert len(list(read_conversations(path))) == 100
    monkeypatch.setattr(contents, "_FREELY_UNPACKED", 1 << 20)
    with pytest.raises(DataError, match="unpacks to more than 1 MiB and 250 times its size"):
        list(read_conversations(path))


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_a_table_that_expands(tmp_path, monkeypatch, use_dictionary):
    """By its own account, or once its rows are read, each of which has one value of all."""
    monkeypatch.setattr(contents, "_FREELY_UNPACKED", 1 << 20)
    table = pa.table({"prompt": ["q"] * 100, "completion": ["x" * 50_000] * 100})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="zstd", use_dictionary=use_dictionary)
    with pytest.raises(DataError, match="unpacks to more than 1 MiB and 250 times its size"):
        list(read_conversations(path))


def test_rows_of_csv(tmp_path):
    rows = 'question,answer\r\n"Two\r\nlines, ""quoted""","' + "y" * 200_000 + '"\r\n\r\nx,z\r\n'
    first, second = read_conversations(write(tmp_path / "a.csv", rows))
    assert first.messages[0].content == 'Two\r\nlines, "quoted"'
    assert len(first.messages[1].content) == 200_000 and second.messages[1].content == "z"
    reading = read_conversations(
        write(tmp_path / "b.csv.gz", gzipped(b"question,answer\nx\ny,z\n"))
    )
    assert len(list(reading)) == 1 and reading.dropped == {"content is null": 1}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('question,answer\nx,"1,2",3\n', "line 2: a row of 3 fields under 2 columns"),
        ("question,answer\nx,caf\u00e9\n".encode("latin-1"), "iconv -f ISO-8859-1"),
        ("question,answer\nx,y\n".encode("utf-16"), "iconv -f UTF-16"),
        ("", "is empty"),
        ("id,role,message\n1,user,Hi\n1,bot,Ho\n", "Each record seems to be one message: gather"),
        ("question,answer,answer\nx,y,z\n", "two of its columns are called answer"),
        ("question,answer\n", "holds no record"),
        ("sep=;\n", "holds no record"),
        ('question,"answer\nx,y\n', "line 2: the last row has a quote without an end"),
        (
            "question^answer\nx^y\n",
            "columns are question.answer. If they .*line above, as sep=\\^",
        ),
        (
            "Hi there.,Hello\nx,y\n",
            "They are its first line: write one above it, as prompt,completion",
        ),
        ("prompt, completion\nx, y\n", "Take the space out of ' completion'"),
        (
            "messages\n\"[{'role': 'user', 'content': 'x'}, {'role': 'assistant'}]\"\n",
            "under messages is a list as Python prints it, .*from this file, by `df",
        ),
        (
            "messages\n\"[{'role': 'user', 'content': 'x'}\n {'role': 'assistant'}]\"\n",
            "under messages is a list as NumPy prints it, .*json.dumps.list.turns",
        ),
        (
            "messages\n\"[array([{'role': 'user'}], dtype=object)]\"\n",
            "under messages is a list as NumPy prints it",
        ),
        (
            "prompt,completion\n"
            "\"[{'role': 'user', 'content': 'x'}]\",\"[{'role': 'assistant', 'content': 'x'}]\"\n",
            "under prompt is a list as Python prints it",
        ),
        ('\nquestion,answer\nx,"y\nx,y\n', "line 4: the last row has a quote without an end"),
    ],
)
def test_tables_of_text_that_cannot_be_read(tmp_path, data, words):
    with pytest.raises(DataError, match=words):
        list(read_conversations(write(tmp_path / "a.csv", data)))


@pytest.mark.parametrize(
    "text",
    [
        "prompt|completion\nHi|Hello\n",
        "sep=;\nprompt;completion\nHi;Hello\n",
        '"sep=^"\r\n\r\nprompt^completion\r\nHi^Hello\r\n',
        'prompt,completion,"a;b;c;d"\nHi,Hello,\n',
        'prompt,completion,"two\nlines"\nHi,Hello,\n',
        "prompt;completion;a|b|c|d\nHi;Hello;\n",
    ],
)
def test_what_stands_between_columns(tmp_path, text):
    (found,) = read_conversations(write(tmp_path / "a.csv", text))
    assert [message.content for message in found.messages] == ["Hi", "Hello"]


@pytest.mark.parametrize("name", ["a.tsv", "A.TSV.gz"])
def test_tabs_stand_between_the_columns_of_a_tsv(tmp_path, name):
    """Whatever else is in their names; where there is none, it is told as of a CSV."""
    pack = gzipped if name.endswith("gz") else bytes
    for text in (b"prompt\tcompletion\ta,b,c\nHi\tHello\t\n", b"prompt,completion\nHi,Hello\n"):
        (found,) = read_conversations(write(tmp_path / name, pack(text)))
        assert [message.content for message in found.messages] == ["Hi", "Hello"]


def test_lines_of_a_table_are_counted_from_the_files_first(tmp_path):
    text = '\nsep=;\n"prompt\n";completion\nHi;Hello\nx;y;z\n'
    with pytest.raises(DataError, match="line 6: a row of 3 fields"):
        list(read_conversations(write(tmp_path / "a.csv", text)))
