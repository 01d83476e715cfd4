"""Chat files in archives, and beside files that hold no chats."""

import io
import json
import tarfile
import zipfile

import pytest
from chat_files import LINES, LIST, RECORDS, arrow_stream, bzip2, gzipped, parquet, write, xz, zstd

from medusa_exp.data import DataError, contents, read_conversations

CSV = "question,answer\nWhat is 2+2?,It is 4.\n"
MEMBERS = {
    "../../chats/a.json": LIST,
    "b.jsonl.gz": gzipped(LINES),
    "c/d.csv": CSV.encode(),
    "e.parquet": parquet(RECORDS),
    "f/data-0.arrow": arrow_stream(RECORDS),
    "f/cache-0123.arrow": arrow_stream(RECORDS),
    "__MACOSX/a.json": b"not chats",
    "c/.hidden.json": b"not chats",
    "chat.html": b"<html>",
    "user.json": b'{"id": "u-1", "email": "x@y.z"}',
}
IDS = {f"r-{number}" for number in range(5)}


def zipped(members, **options):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return sink.getvalue()


def tarred(members):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        link = tarfile.TarInfo("link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def tar_gz(members):
    return gzipped(tarred(members))


def tar_zst(members):
    return zstd(tarred(members))


def tar_bz2(members):
    return bzip2(tarred(members))


@pytest.mark.parametrize("pack", [zipped, tarred, tar_gz, tar_bz2, tar_zst])
def test_members_of_archives(tmp_path, pack, caplog):
    path = write(tmp_path / "a.zip", pack(MEMBERS))
    reading = read_conversations(path)
    for _ in range(2):
        found = list(reading)
        assert len(found) == 21 and {conversation.id for conversation in found} > IDS
        assert found[10].source == f"{path}!c/d.csv" and found[10].number == 1
    assert reading.paths == [path] and reading.num_records == 22
    assert reading.forms == {"messages": 20, "question": 1}
    assert reading.dropped == {"no known form of chat": 1}
    assert caplog.text.count("passed over, for it holds no chats") == 1  # however often it is read
    assert "user.json has no known form of chat: its keys are id, email" in caplog.text
    assert (
        "files passed over: f/cache-0123.arrow, __MACOSX/a.json, c/.hidden.json, chat.html"
        in caplog.text.replace("link.json, ", "")
    )
    assert list(tmp_path.iterdir()) == [path]  # nothing is unpacked to disk


@pytest.mark.parametrize("pack", [zipped, tar_gz])
def test_archives_that_cannot_be_read(tmp_path, pack):
    def fault_of(data):
        with pytest.raises(DataError) as caught:
            list(read_conversations(write(tmp_path / "a.zip", data)))
        assert str(tmp_path / "a.zip") in str(caught.value)
        return str(caught.value)

    assert "holds no *.json" in fault_of(pack({"README.md": b"x"}))
    assert "README.md." in fault_of(pack({"README.md": b"x"}))
    assert "its keys are id, email" in fault_of(pack({"user.json": MEMBERS["user.json"]}))
    assert "a.json" in fault_of(pack({"a.json": LIST[:-20]}))
    whole = pack({"a.json": json.dumps(RECORDS * 2000).encode()})
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    assert "damaged" in fault_of(bytes(broken)) or "cut off" in fault_of(bytes(broken))
    assert "a.zip is " in fault_of(whole[: len(whole) // 2])
    assert "b.zip: an archive within an archive" in fault_of(pack({"b.zip": b"x", "c.md": b"x"}))
    inner = fault_of(pack({"a.json": zipped({"b.json": LIST})}))
    assert "is a zip archive in an archive" in inner


@pytest.mark.parametrize("is_unknown", [True, False])
def test_members_that_are_damaged_or_packed_in_an_unknown_way(tmp_path, is_unknown):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.jsonl", LINES * 100)
    data = bytearray(sink.getvalue())
    places = [8, data.find(b"PK\x01\x02") + 10] if is_unknown else [70]
    for place in places:  # of the number of the method; within what is packed
        data[place] ^= 99
    with pytest.raises(DataError, match=r"a\.zip.* is damaged"):
        list(read_conversations(write(tmp_path / "a.zip", bytes(data))))


def test_a_damaged_header_is_no_end_of_a_tar(tmp_path):
    data = bytearray(tarred({"a.jsonl": LINES, "b.jsonl": LINES}))
    data[data.find(b"b.jsonl")] ^= 1
    with pytest.raises(DataError, match=r"a\.tar is damaged"):
        list(read_conversations(write(tmp_path / "a.tar", bytes(data))))


@pytest.mark.parametrize("zeros", [512, 1024])
def test_zeros_in_the_place_of_a_header_are_no_end_of_a_tar(tmp_path, zeros):
    data = bytearray(tarred({"a.jsonl": LINES, "b.jsonl": LINES, "c.jsonl": LINES}))
    assert len(list(read_conversations(write(tmp_path / "a.tar", bytes(data))))) == 3 * len(RECORDS)
    at = data.find(b"b.jsonl")
    data[at : at + zeros] = bytes(zeros)
    with pytest.raises(DataError, match=r"a\.tar is damaged \(a (lone block|file's header after)"):
        list(read_conversations(write(tmp_path / "a.tar", bytes(data))))


def test_a_tar_that_was_cut_between_two_files_is_no_whole_one(tmp_path):
    data = tarred({"a.jsonl": LINES, "b.jsonl": LINES})
    data = data[: data.find(b"b.jsonl")]
    for name, packed in (("a.tar", data), ("a.tar.gz", gzipped(data))):
        with pytest.raises(DataError, match="nothing marks its end: was it cut"):
            list(read_conversations(write(tmp_path / name, packed)))


@pytest.mark.parametrize("is_label", [False, True])
def test_a_tar_whose_first_header_has_no_mark(tmp_path, is_label):
    """The oldest format has none, and GNU's label of an archive."""
    header = tarfile.TarInfo("label" if is_label else "a.jsonl")
    header.size = 0 if is_label else len(LINES)
    header.type = b"V" if is_label else tarfile.REGTYPE
    block = bytearray(header.tobuf(tarfile.USTAR_FORMAT))
    block[257:265], block[148:156] = bytes(8), b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    first = b"" if is_label else LINES.ljust(-(-len(LINES) // 512) * 512, b"\0")
    data = bytes(block) + first + tarred({"b.jsonl": LINES})
    found = list(read_conversations(write(tmp_path / "a.tar", data)))
    assert len(found) == len(RECORDS) * (1 if is_label else 2)


def test_behind_the_end_of_a_tar_may_be_anything(tmp_path):
    data = tarred({"a.jsonl": LINES})[:-512] + b"as old programs left it in a buffer".ljust(512)
    assert len(list(read_conversations(write(tmp_path / "a.tar", data)))) == len(RECORDS)


@pytest.mark.parametrize("pack", [bzip2, xz, gzipped], ids=["bzip2", "xz", "gzip"])
def test_no_later_stream_that_is_damaged_is_an_end(tmp_path, pack):
    """As `bzip2 -c b >> a.bz2` makes them, and programs that pack in parallel."""
    one = pack(LINES)
    path = write(tmp_path / "a.jsonl.packed", one + bytes(8) + one + bytes(8))
    assert len(list(read_conversations(path))) == 2 * len(RECORDS)
    for at in (1, len(one) // 2):
        other = bytearray(one)
        other[at] ^= 16
        with pytest.raises(DataError, match=r"is damaged|is cut off"):
            list(read_conversations(write(path, one + bytes(other))))
    with pytest.raises(DataError, match="is cut off"):
        list(read_conversations(write(path, one + one[:-9])))


def test_an_archive_with_a_password(tmp_path):
    data = bytearray(zipped({"a.json": LIST}))
    data[6] |= 1  # of the member, and of the archive's list of them
    data[data.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(DataError, match="locked by a password"):
        list(read_conversations(write(tmp_path / "a.zip", bytes(data))))


@pytest.mark.parametrize(
    "pack",
    [
        gzipped,
        bzip2,
        xz,
        zstd,
        lambda data: zipped({"a.json": data}),
        lambda data: zipped({f"{i}.jsonl": data[: len(data) // 8] for i in range(8)}),
        lambda data: zipped({"a.json.gz": gzipped(data)}),
        lambda data: tar_gz({"a.json": data}),
    ],
    ids=["gzip", "bzip2", "xz", "zstd", "zip", "several members", "gzip in zip", "tar.gz"],
)
def test_what_unpacks_to_absurd_sizes(tmp_path, pack, monkeypatch):
    path = write(tmp_path / "a.json", pack(b'["' + b"x" * (1 << 22)))
    with pytest.raises(DataError, match=r"is cut off|no line of it"):
        list(read_conversations(path))
    monkeypatch.setattr(contents, "_FREELY_UNPACKED", 1 << 20)
    with pytest.raises(DataError, match=r"a\.json.* unpacks to more than 1 MiB and 250 times"):
        list(read_conversations(path))


def test_chats_that_are_packed_well_are_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_FREELY_UNPACKED", 1 << 20)
    path = write(
        tmp_path / "a.jsonl.gz",
        gzipped(
            b"".join(
                json.dumps(
                    {
                        "messages": [
                            {"role": "user", "content": f"What is {i} + {i * i}?"},
                            {"role": "assistant", "content": str(i + i * i)},
                        ]
                    }
                ).encode()
                + b"\n"
                for i in range(20_000)
            )
        ),
    )
    assert len(list(read_conversations(path))) == 20_000


def test_files_of_a_folder_without_chats_are_passed_over(tmp_path, caplog):
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "dataset_infos.json", json.dumps({"default": {"features": {"x": 1}}}))
    write(tmp_path / "labels.csv", "name,label\nx,1\n")
    write(tmp_path / "none.json", "[]")
    write(tmp_path / "stats.parquet", parquet([{"n": 1}]))
    reading = read_conversations(tmp_path)
    assert len(list(reading)) == 5 and len(list(reading)) == 5
    for name, keys in (("dataset_infos.json", "default"), ("labels.csv", "name, label")):
        assert caplog.text.count(f"{name} has no known form of chat: its ") == 1
        assert f" are {keys}. " in caplog.text
    assert "its columns are n" in caplog.text
    assert caplog.text.count("none.json holds no record") == 1
    assert len(list(read_conversations(f"{tmp_path}/*"))) == 5
    with pytest.raises(DataError, match="its keys are default"):  # named by itself
        list(read_conversations(tmp_path / "dataset_infos.json"))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match="its keys are default"):  # nothing else is there
        list(read_conversations(tmp_path))


@pytest.mark.parametrize("data", [b"", b" \n", gzipped(b"")])
def test_an_empty_file_among_others_is_passed_over(tmp_path, caplog, data):
    write(tmp_path / "a.jsonl", LINES)
    empty = write(tmp_path / "today.jsonl", data)
    write(tmp_path / "b.zip", zipped({"c.jsonl": data}))
    reading = read_conversations(tmp_path)
    assert len(list(reading)) == 5 and len(list(reading)) == 5
    for name in (empty, tmp_path / "b.zip!c.jsonl"):
        assert caplog.text.count(f"passed over, for it holds no chats: {name} is empty") == 1
    with pytest.raises(DataError, match="is empty"):
        list(read_conversations(empty))


@pytest.mark.parametrize("name", ["b.parquet", "b.arrow", "b.zip", "b.tar.gz", "b.jsonl.gz"])
def test_an_empty_table_or_archive_is_what_a_copy_has_left(tmp_path, name):
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / name, b"")
    with pytest.raises(DataError, match=f"{name} is empty"):
        list(read_conversations(tmp_path))


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("xl/workbook.xml", "is an Excel workbook: save it as CSV in UTF-8"),
        ("word/document.xml", "is a Word document"),
        ("archive/data.pkl", "is a file of PyTorch, a pickle, which may .* never opened"),
        ("a.npy", "is an archive of NumPy's arrays"),
    ],
)
def test_archives_that_are_something_else(tmp_path, member, words):
    path = write(tmp_path / "a.bin", zipped({"[Content_Types].xml": b"<x/>", member: b"x"}))
    with pytest.raises(DataError, match=words):
        list(read_conversations(path))
    path.write_bytes(zipped({}))
    with pytest.raises(DataError, match=r"holds no \*\.json"):
        list(read_conversations(path))
    path.write_bytes(tarred({member: b"x"}))  # no such kind is a tar, or a folder
    with pytest.raises(DataError, match=r"holds no \*\.json"):
        list(read_conversations(path))
    (tmp_path / "folder" / member).parent.mkdir(parents=True)
    write(tmp_path / "folder" / member, b"x")
    with pytest.raises(DataError, match=r"folder holds no \*\.json.* It holds "):
        list(read_conversations(tmp_path / "folder"))
