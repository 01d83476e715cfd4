"""Files that are named for chats by mistake: what they are, by first bytes or by their members."""

import re
from collections.abc import Sequence

_PICKLE = "a pickle, which may run the code of others and is never opened"
_AS_LINES = "write its chats as JSON Lines"
_NO_CHATS = "dataset.path names the chats"
_UNPACK = "unpack it and name what it holds"
# No pattern is the beginning of any text: a table of text is told by its name, after this.
_BEGINNINGS = [
    (rb"version https://git-lfs", "a Git LFS pointer, not the data", "run `git lfs pull`"),
    (
        rb"PK(\x03\x04|\x05\x06)",
        "a zip archive in an archive",
        "unpack it and name the file inside",
    ),
    (
        rb"(?i)<(!doctype|html|head|\?xml)",
        "a web page, not chats",
        "the download got a page instead of the file",
    ),
    (rb"\x80[\x02-\x05]", _PICKLE, _AS_LINES),
    (rb"\x93NUMPY", "an array of NumPy", _AS_LINES),
    (rb"FEA1\0", "a Feather file of version 1, as nothing writes any more", "save it as Parquet"),
    (rb"Obj\x01", "an Avro file", _AS_LINES),
    (rb"\x89HDF\r\n", "an HDF5 file", _AS_LINES),
    (rb"SQLite format 3\0", "an SQLite database", _AS_LINES),
    (rb"(?s).{4}\0{4}\{\"", "a safetensors file of weights", _NO_CHATS),
    (rb"GGUF[\x01-\x09]\0", "a GGUF file of weights", _NO_CHATS),
    (rb"%PDF-", "a PDF document", _AS_LINES),
    (
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "a document of Excel or Word",
        "save it as CSV in UTF-8",
    ),
    (rb"(?s)\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP", "a picture", _NO_CHATS),
    (
        rb"(?s)RIFF.{4}(WAVE|AVI )|ID3[\x02-\x04]|OggS\0|fLaC\0|\0{2}.{2}ftyp|\x1aE\xdf\xa3",
        "a sound or a video",
        _NO_CHATS,
    ),
    (rb"7z\xbc\xaf\x27\x1c", "an archive of 7z", _UNPACK),
    (rb"Rar!\x1a\x07", "an archive of RAR", _UNPACK),
    (rb"\x04\x22\x4d\x18", "packed by lz4", _UNPACK),
]
_MEMBERS = [
    (r"xl/workbook\.", "an Excel workbook", "save it as CSV in UTF-8"),
    (r"word/document\.", "a Word document", _AS_LINES),
    (r"ppt/presentation\.", "a presentation of PowerPoint", _AS_LINES),
    (r"META-INF/manifest\.xml", "an OpenDocument file", "save it as CSV in UTF-8"),
    (r"(.*/)?data\.pkl$", f"a file of PyTorch, {_PICKLE}", _AS_LINES),
    (r".*\.npy$", "an archive of NumPy's arrays", _AS_LINES),
]
TELEGRAM = (
    """write its texts by `jq -c '(.chats.list? // [.])[] | {messages: [.messages[] | """
    """select(.type == "message" and .text != "") | {from, value: ([.text] | flatten | """
    """map(.text? // .) | join(""))}]}' FILE > chats.jsonl`, and say whose each name is, as in """
    "'dataset.role_map={ann: user, bob: assistant}'"
)
_INTENTS = (
    "training data of intents, as Rasa's: what may be asked, without the talks in which it was "
    "answered",
    'heads are trained on answers, as in {"messages": [{"role": "user", ...}, {"role": '
    '"assistant", ...}]}',
)
_TRACKED = (
    "the events that Rasa has tracked",
    """write its talks by `jq -c '{messages: [.events[] | select(.event == "user" or .event == """
    """"bot") | {role: .event, content: .text}]}' FILE > chats.jsonl`""",
)
_SLACK = (
    """write each day of a channel, which is a file, by `jq -c '{messages: [.[] | """
    """select(.type == "message") | {from: .user, value: .text}]}' FILE >> chats.jsonl`, and say """
    "whose each user is, as in 'dataset.role_map={U1: user, U2: assistant}'"
)
_RECORDS = [
    ({"rasa_nlu_data"}, *_INTENTS),
    ({"intents", "responses"}, *_INTENTS),
    ({"intent", "text", "entities"}, *_INTENTS),
    ({"tag", "patterns"}, *_INTENTS),
    ({"story", "steps"}, *_INTENTS),
    ({"rule", "steps"}, *_INTENTS),
    ({"sender_id", "events"}, *_TRACKED),
    ({"event", "timestamp"}, *_TRACKED),
    (
        {"user_name", "character_name", "chat_metadata"},
        "a chat of SillyTavern, a message a line",
        """write it as one record by `jq -cs '{messages: [.[] | select(.mes) | {role: (if """
        """.is_user then "user" else "assistant" end), content: .mes}]}' FILE > chats.jsonl`""",
    ),
    ({"id", "name", "members"}, "a list of channels, as of Slack's export", _SLACK),
    ({"user", "text", "ts"}, "a day of a channel in Slack's export", _SLACK),
    ({"about", "chats"}, "Telegram's export of all chats", TELEGRAM),
]
"""Keys of a record that is no chat, what its file is, and what to do."""


def kind_by_keys(keys: Sequence[str]) -> str | None:
    """Return what a file is, and what to do, by the keys of a record that is no chat."""
    found = (f"is {kind}: {advice}." for of_kind, kind, advice in _RECORDS if of_kind <= {*keys})
    return next(found, None)


def kind_by_beginning(head: bytes) -> str | None:
    """Return what a file is and what to do, by its first bytes; None where it may be chats."""
    found = (
        f"is {kind}: {advice}." for begin, kind, advice in _BEGINNINGS if re.match(begin, head)
    )
    return next(found, None)


def kind_by_members(names: Sequence[str]) -> str | None:
    """Return what a zip archive is, besides one, by the names of what it holds."""
    for pattern, kind, advice in _MEMBERS:
        if any(re.match(pattern, name) for name in names):
            return f"is {kind}: {advice}."
    return None
