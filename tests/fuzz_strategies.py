"""What the fuzz tests draw from: data files, whole and damaged, with options of the data module, and config values."""

import csv
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

SPECIAL = ["<eos>", "<pad><bos>", "<|im_start|>", "<bos><eos>"]
NEARLY_EMPTY = ["", " ", "\n\t", "\x00", "\u200b", "\ufeff", "\u2028", "\x85"]
BROKEN_TEXT = ["\ud800", "a\udfffb"]
LONG = "the cat " * 3000
TEXTS = ["the cat", "a dog ran away", "red", 'ünï, "cödé" 猫\r\n', "x: InputError: y", "{{ 7 * 7 }}", "\x1b[31mred"]
NO_PROMPTS: list[Any] = [None, 7, -0.5, True, 10**400, math.nan, [], {}, [[]], ["a"], [None], {"role": "user"}]
RAW_LINES = [
    '{"prompt": ' + "1" * 5000 + "}",
    '{"prompt": ' + "[" * 50_000,
    "[" * 50_000 + "]" * 50_000,
    '{"prompt": "a", "prompt": "b"}',
    '{"prompt": "a"}{"prompt": "b"}',
    '{"prompt": Infinity}',
    '{"prompt": "\\ud83d"}',
    '{"\\ud800": "a", "prompt": "b"}',
    '{"prompt": "a", "extra": 1}',
    *("null", "NaN", '"text"', "7", "{}", "[]", "{", "\x00", ",,,,", '"', '"a"b"', "\ufeff", "a" * 140_000),
]

# ---- rows ----

texts = st.one_of(st.sampled_from(TEXTS), st.text(min_size=1, max_size=12))
strange_texts = st.sampled_from([*SPECIAL, *NEARLY_EMPTY, *BROKEN_TEXT, LONG])
good_messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": texts}),
    min_size=1,
    max_size=3,
)
bad_messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name", "tool_calls"]),
        st.one_of(texts, strange_texts, st.sampled_from([None, 7, ["a"], {"type": "text"}])),
        max_size=3,
    ),
    max_size=3,
)
strange_prompts = st.one_of(strange_texts, st.sampled_from(NO_PROMPTS), good_messages, bad_messages)
other_columns = st.dictionaries(
    st.sampled_from(["answer", "prompts", "Prompt", "", "ñ", "prompt_ids"]),
    st.one_of(texts, st.sampled_from([*NO_PROMPTS, *BROKEN_TEXT])),
    max_size=2,
)


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw rows: mostly well formed, all with the same columns; sometimes one that is not."""
    name = draw(st.sampled_from(["prompt"] * 9 + ["text"]))
    others = draw(other_columns)
    least = st.sampled_from([1, 2, 3, 4, 0])
    kind = draw(st.sampled_from([texts, texts, texts, st.one_of(texts, strange_texts), good_messages]))
    drawn = [{name: prompt, **others} for prompt in draw(st.lists(kind, min_size=draw(least), max_size=6))]
    if drawn and draw(st.integers(0, 3)) == 3:
        row = drawn[draw(st.integers(0, len(drawn) - 1))]
        row[name] = draw(strange_prompts)
        if draw(st.integers(0, 3)) == 3:
            row.update(draw(other_columns))
    return drawn


# ---- files ----


@dataclass(frozen=True)
class DataFile:
    """A data file, and the rows that it holds if it is whole; None where it was damaged."""

    suffix: str
    content: bytes
    rows: list[dict[str, Any]] | None

    def __repr__(self) -> str:
        shown = self.content if len(self.content) <= 600 else self.content[:300] + b" ... " + self.content[-100:]
        return f"DataFile({self.suffix!r}, {len(self.content)} bytes: {shown!r}, rows={self.rows!s:.400})"


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@st.composite
def text_files(draw: st.DrawFn) -> DataFile:
    """Draw a JSON, JSON Lines or CSV file."""
    suffix, drawn = draw(st.sampled_from([".jsonl", ".json", ".csv"])), draw(rows())
    if suffix == ".csv":
        buffer = io.StringIO(newline="")
        columns = list(drawn[0]) if drawn else ["prompt"]
        writer = csv.writer(buffer)
        writer.writerows([columns, *([row.get(column) for column in columns] for row in drawn)])
        return DataFile(suffix, _as_bytes(buffer.getvalue()), None)
    plain = draw(st.booleans())
    lines = [json.dumps(row, ensure_ascii=plain) for row in drawn]
    if suffix == ".json" and draw(st.booleans()):
        return DataFile(suffix, _as_bytes("[" + ",\n".join(lines) + "]"), drawn)
    for place in draw(st.lists(st.integers(0, len(lines)), max_size=2)):
        lines.insert(place, draw(st.sampled_from(["", "  ", "\r", "\t"])))
    ending = draw(st.sampled_from(["\n", "\r\n"]))
    return DataFile(suffix, _as_bytes("".join(line + ending for line in lines)), drawn)


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
COLUMNS: list[tuple[pa.DataType, list[Any]]] = [
    (pa.string(), ["the cat", "a dog", "red"]),
    (pa.string(), ["the cat", None, ""]),
    (pa.large_string(), ["the cat", "a dog"]),
    (pa.string_view(), ["the cat", "a dog"]),
    (pa.dictionary(pa.int8(), pa.string()), ["the cat", "the cat", "red"]),
    (MESSAGES, [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "red"}]]),
    (MESSAGES, [[{"role": None, "content": "hi"}], [None], None]),
    (pa.list_(pa.string()), [["a"], []]),
    (pa.int64(), [1, None]),
    (pa.bool_(), [True]),
    (pa.float16(), [1.5, math.nan]),
    (pa.binary(), [b"the cat", b"\xff"]),
    (pa.null(), [None, None]),
    (pa.decimal128(38, 2), [10]),
    (pa.timestamp("ns"), [2**62, -(2**62)]),
    (pa.timestamp("us", "Nowhere/Town"), [0]),
    (pa.timestamp("s"), [2**60]),
    (pa.date32(), [0, 2**30]),
    (pa.time64("ns"), [1]),
    (pa.duration("s"), [2**60]),
    (pa.month_day_nano_interval(), [(1, 2, 3)]),
    (pa.map_(pa.string(), pa.int64()), [[("a", 1)]]),
    (pa.struct([("role", pa.string())]), [{"role": "user"}, None]),
    (pa.struct([]), [{}]),
    (pa.uint64(), [2**64 - 1]),
]
METADATA = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'{"info": 7}',
    b'{"info": {"features": {"prompt": {"_type": "Nope"}}}}',
    b"\xff",
]


@st.composite
def parquet_files(draw: st.DrawFn) -> DataFile:
    """Draw a Parquet file of columns of any type."""
    names = ["prompt", *draw(st.lists(st.sampled_from(["prompt", "text", "answer", "", "prompt.x"]), max_size=2))]
    fine = st.sampled_from(COLUMNS[:1] * 3 + COLUMNS[2:6])
    chosen = [draw(st.sampled_from(COLUMNS) if draw(st.integers(0, 4)) == 4 else fine) for _ in names]
    length = min(draw(st.sampled_from([2, 3, 1, 0])), *(len(values) for _, values in chosen))
    table = pa.Table.from_arrays([_array(kind, values[:length]) for kind, values in chosen], names=names)
    if draw(st.integers(0, 6)) == 6:
        table = table.replace_schema_metadata({b"huggingface": draw(st.sampled_from(METADATA))})
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink, compression=draw(st.sampled_from(["none", "snappy", "zstd"])))
    except pa.ArrowException:  # a type that Parquet cannot hold
        return DataFile(".parquet", b"", None)
    rows_of_text = [{"prompt": value} for value in chosen[0][1][:length]] if chosen[0] in COLUMNS[:4] else None
    return DataFile(".parquet", sink.getvalue(), rows_of_text)


def _array(kind: pa.DataType, values: list[Any]) -> pa.Array:
    if pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        width = pa.int32() if pa.types.is_date32(kind) else pa.int64()
        return pa.array(values, width).view(kind)
    return pa.array(values, kind)


@st.composite
def damaged(draw: st.DrawFn, files: st.SearchStrategy[DataFile]) -> DataFile:
    """Draw a file and damage it in one way."""
    file = draw(files)
    content, place = bytearray(file.content), draw(st.integers(0, len(file.content)))
    kind = draw(st.sampled_from(["cut", "flip", "overwrite", "insert", "append", "line", "encoding", "twice"]))
    if kind == "cut":
        del content[place:]
    elif kind == "flip" and content:
        content[place % len(content)] ^= 1 << draw(st.integers(0, 7))
    elif kind == "overwrite":
        content[place : place + 4] = draw(st.binary(min_size=1, max_size=4))
    elif kind == "insert":
        content[place:place] = draw(st.sampled_from([b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"\xc3"]))
    elif kind == "append":
        content += draw(st.one_of(st.binary(min_size=1, max_size=20), st.just(b"\n\n"), st.just(b"PAR1")))
    elif kind == "line":
        lines = bytes(content).split(b"\n")
        lines.insert(draw(st.integers(0, len(lines))), _as_bytes(draw(st.sampled_from(RAW_LINES))))
        content = bytearray(b"\n".join(lines))
    elif kind == "encoding":
        name = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-7"]))
        content = bytearray(file.content.decode("utf-8", "replace").encode(name, "replace"))
    elif kind == "twice":
        content += file.content
    return DataFile(file.suffix, bytes(content), None)


noise_files = st.builds(DataFile, st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]), st.binary(), st.none())
data_files = st.one_of(
    text_files(),
    parquet_files(),
    damaged(text_files()),
    damaged(parquet_files()),
    text_files(),
    text_files(),
    noise_files,
)

# ---- options of the data module ----

_SIZES = [1, 2, 3, 100]
_WRONG_SIZES = [0, -1, 2**63, 10**30]
WRONG_OPTIONS: dict[str, list[Any]] = {
    "batch_size": _WRONG_SIZES,
    "validation_batch_size": _WRONG_SIZES,
    "max_prompts": _WRONG_SIZES,
    "max_prompt_tokens": _WRONG_SIZES,
    "shuffle_buffer": [*_WRONG_SIZES, 5],
    "validation_size": [-1, 6, 10**30, 1.0, 1e-300, math.nan, math.inf, -math.inf, 0.5],
    "truncate": ["left", "drop"],
    "streaming": [True],
    "seed": [-1, 2**64, 10**30],
    "prompt_column": ["text", "", "promt", "\ud800"],
    "split": ["test", ""],
    "subset": ["x"],
}


@st.composite
def data_options(draw: st.DrawFn) -> dict[str, Any]:
    """Draw options of the data module that go together; sometimes with one that does not."""
    options: dict[str, Any] = {"batch_size": draw(st.sampled_from(_SIZES))}
    for name in ("shuffle", "streaming", "drop_last"):
        options[name] = draw(st.booleans())
    if draw(st.booleans()):
        options["max_prompt_tokens"] = draw(st.sampled_from([1, 2, 8, 40]))
        options["truncate"] = draw(st.sampled_from(["left", "left", "drop", "error"]))
    if options["streaming"] and options["shuffle"]:
        options["shuffle_buffer"] = draw(st.sampled_from([1, 2, 1000]))
    if not options["streaming"]:
        options["validation_size"] = draw(st.sampled_from([0, 0, 1, 2, 0.3, 0.5]))
    for name in ("max_prompts", "validation_batch_size"):
        options[name] = draw(st.sampled_from([None, None, *_SIZES]))
    if draw(st.integers(0, 5)) == 5:
        name = draw(st.sampled_from(sorted(WRONG_OPTIONS)))
        options[name] = draw(st.sampled_from(WRONG_OPTIONS[name]))
    return options
