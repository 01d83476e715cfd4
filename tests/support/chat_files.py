"""Chat files of every form, for tests of reading them."""

import bz2
import gzip
import io
import json
import lzma

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def conversation_record(number: int) -> dict:
    """Return a ShareGPT record."""
    return {
        "id": f"sums-{number}",
        "conversations": [
            {"from": "human", "value": f"What is {number} + 1?"},
            {"from": "gpt", "value": f"{number} + 1 = {number + 1}."},
        ],
    }


BOM = b"\xef\xbb\xbf"


def record(number):
    turns = [("human", f"What is {number}? caf\u00e9"), ("gpt", f"It is {number}.")]
    return {"id": f"r-{number}", "conversations": [{"from": f, "value": v} for f, v in turns]}


RECORDS = [record(number) for number in range(5)]
LIST = json.dumps(RECORDS, ensure_ascii=False).encode()
LINES = b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in RECORDS)
PRETTY = json.dumps(RECORDS, indent=2).encode()


def gzipped(data):
    # Without the time of day: the names of tests are made of their data, and several processes
    # have to agree on them.
    return gzip.compress(data, mtime=0)


bzip2, xz = bz2.compress, lzma.compress


def zstd(data):
    import pyarrow as pa  # sessions that read no such file have no pyarrow

    return pa.compress(data, "zstd", asbytes=True)


def parquet(rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue()


def arrow(rows, is_stream=False, is_empty=False, **options):
    import pyarrow as pa

    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        if not is_empty:
            writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def arrow_stream(rows):
    return arrow(rows, is_stream=True)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path
