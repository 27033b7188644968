"""Rows as people have them: files of every kind, dialects of chats, and what is bad about a row."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re

import datasets
import pyarrow
import pytest

from ppow.training.data import BadRows, load_rows
from ppow.training.rows import normal, options_of
from ppow.training.sources import BadRow, read_source

USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}
CHAT = [USER, ANSWER]
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
CALLED = [USER, CALLING, {"role": "tool", "content": "noon"}, ANSWER]
AS_TEXT = {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}  # as OpenAI has it
OLD_CALL = {"role": "assistant", "content": None, "function_call": AS_TEXT["function"]}
BE, DEVELOPER = {"role": "system", "content": "Be."}, {"role": "developer", "content": "Be."}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# -- dialects ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hi."}]}, CHAT),
        ({"conversations": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}]}, CHAT),
        ({"conversation": [{"from": "user", "value": "Hi?"}, {"from": "chatgpt", "value": "Hi."}]}, CHAT),
        ({"messages": [{"role": "Human", "content": "Hi?"}, {"role": "Assistant", "content": "Hi."}]}, CHAT),
        ({"messages": [{**USER, "name": None, "tool_calls": None}, ANSWER]}, CHAT),
        ({"messages": None, "conversations": CHAT, "text": None}, CHAT),
        ({"messages": json.dumps(CHAT)}, CHAT),
        ({"messages": str(CHAT)}, CHAT),  # as pandas writes a column of lists
        ({"prompt": "Hi?", "completion": "Hi."}, CHAT),
        ({"prompt": "Hi?", "response": "Hi.", "text": "Hi? Hi."}, CHAT),
        ({"prompt": [USER], "completion": [ANSWER]}, CHAT),
        ({"question": "Hi?", "answer": "Hi."}, CHAT),
        ({"instruction": "Hi?", "output": "Hi."}, CHAT),
        ({"instruction": "Hi?", "input": "", "output": "Hi."}, CHAT),
        ({"prompt": "Hi?", "completion": "Hi.", "input": "no"}, CHAT),
        ({"instruction": "A", "input": "1", "output": "Hi."}, [{"role": "user", "content": "A\n\n1"}, ANSWER]),
        ({"instruction": "Hi?", "output": "Hi.", "history": [["Hi?", "Hi."]]}, CHAT + CHAT),
        ({"prompt": "Hi?"}, [USER]),
        ({"turns": ["Hi?", "Hi?"]}, [USER, USER]),
        ({"system_prompt": "Be.", "question": "Hi?", "response": "Hi."}, [BE, *CHAT]),
        ({"system": "Be.", "conversations": CHAT}, [BE, *CHAT]),
        ({"system": "", "conversations": CHAT}, CHAT),
        ({"system": "no", "messages": [DEVELOPER, USER]}, [DEVELOPER, USER]),
        ({"messages": CALLED}, CALLED),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, *CALLED[2:]]}, CALLED),
        ({"messages": [USER, {**CALLING, "tool_calls": [AS_TEXT]}, *CALLED[2:]]}, CALLED),
        ({"messages": [USER, OLD_CALL, {"role": "function", "content": "noon"}, ANSWER]}, CALLED),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi?"},
                    {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
                    {"from": "observation", "value": "noon"},
                    {"from": "gpt", "value": "Hi."},
                ]
            },
            CALLED,
        ),
        ({"messages": [USER, {"role": "assistant", "content": None, "refusal": "Hi."}]}, CHAT),
        ({"messages": [USER, {**ANSWER, "reasoning": "Well."}]}, [USER, {**ANSWER, "reasoning_content": "Well."}]),
        ({"messages": [USER, {"role": "tool", "content": {"a": 1}}]}, [USER, {"role": "tool", "content": '{"a": 1}'}]),
    ],
)
def test_every_dialect_becomes_the_same_chat(row, messages):
    assert normal(row)["messages"] == messages


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"type": "text", "text": "Hi"}, {"type": "text", "text": "."}], {"content": "Hi."}),
        ([{"type": "text", "text": "Hi", "image_url": None}, "."], {"content": "Hi."}),
        ([{"text": "Hi."}], {"content": "Hi."}),
        ([{"type": "output_text", "text": "Hi."}], {"content": "Hi."}),
        ([{"type": "refusal", "refusal": "No."}], {"content": "No."}),
        ([], {"content": ""}),
        (
            [{"type": "thinking", "thinking": "Well."}, {"type": "text", "text": "Hi."}],
            {"content": "Hi.", "reasoning_content": "Well."},
        ),
    ],
)
def test_parts_of_content_are_joined(parts, message):
    found = normal({"messages": [USER, {"role": "assistant", "content": parts}]})["messages"][1]
    assert found == {"role": "assistant", **message}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "image"},
        {"type": "input_audio", "input_audio": {}},
        {"type": "tool_use", "name": "clock"},
        {"type": "text"},
        3,
        None,
    ],
)
def test_a_part_that_is_no_text_makes_a_bad_row(part):
    with pytest.raises(BadRow, match=r"content holds (a part of type '|the part ).*only text"):
        normal({"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}, ANSWER]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "expected a non-empty 'messages' list or 'text'"),
        ({"conversations": []}, "expected a non-empty"),
        ({"messages": []}, "expected a non-empty"),
        ({"messages": None, "text": None}, "expected a non-empty"),
        ({"messages": "[{'role'"}, "'messages' is a text that is not JSON"),
        ({"messages": [{"role": "user", "content": None}]}, "a message is"),
        ({"messages": [{"role": "assistant", "content": None}]}, "a message is"),
        ({"messages": [{"role": "user", "content": 3}]}, "a message is"),
        ({"messages": [{"role": 3, "content": "a"}]}, "a message is"),
        ({"messages": [{"content": "a"}]}, "a message is"),
        ({"conversations": [{"from": "alice", "value": "a"}]}, "with one of system, developer, user"),
        ({"conversations": [{"from": "human"}]}, "a message is"),
        ({"conversations": [{"from": "function_call", "value": "clock()"}]}, "tool is a text that is not JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "call of a tool is"),
        ({"prompt": 3, "completion": "a"}, "'prompt' must be a text or a list"),
        ({"messages": CHAT, "tools": "clock"}, "'tools' is a text that is not JSON"),
        ({"messages": CHAT, "tools": ["clock"]}, "'tools' must be a list of JSON objects"),
        ({"messages": CHAT, "chat_template_kwargs": ["a"]}, "'chat_template_kwargs' must be"),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, "'chat_template_kwargs' must be"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, message):
    with pytest.raises(BadRow, match=re.escape(message)):
        normal(row)


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"tools": [CLOCK]}, {"tools": [CLOCK]}),
        ({"tools": json.dumps([CLOCK])}, {"tools": [CLOCK]}),
        ({"tools": [CLOCK["function"]]}, {"tools": [CLOCK]}),
        ({"tools": "[]"}, {}),
        ({"tools": ""}, {}),
        ({"tools": None, "documents": None, "chat_template_kwargs": None}, {}),
        ({"documents": [{"title": "a", "text": "b"}]}, {"documents": [{"title": "a", "text": "b"}]}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": True, "date": "x"}}, {"enable_thinking": True, "date": "x"}),
        ({"chat_template_kwargs": '{"date": "x"}'}, {"date": "x"}),
        ({"reasoning_effort": "high", "thinking": "a column of thoughts"}, {"reasoning_effort": "high"}),
    ],
)
def test_what_shapes_the_prompt_is_kept(columns, options):
    assert options_of(normal({"messages": CHAT, **columns})) == options


def test_a_text_stays_a_text():
    assert normal({"text": "a", "messages": None, "id": 3}) == {"text": "a", "id": 3}
    assert normal({"text": "a", "messages": []}) == {"text": "a"}
    assert normal({"text": "a", "prompt": "a title"}) == {"text": "a", "prompt": "a title"}


# -- files -------------------------------------------------------------------------------------------------------------

ROWS = [{"messages": CHAT}, {"text": "a text, — é"}]


def packed(content, ending):
    if ending == ".zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending](content)


def table(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, ["messages", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({key: json.dumps(row[key]) if key == "messages" else row[key] for key in row} for row in rows)
    return file.getvalue()


COLUMNS = {"messages": [CHAT, None], "text": [None, "a text, — é"]}
BY_INDEX = {key: dict(zip("01", values)) for key, values in COLUMNS.items()}


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(*ROWS)),
        ("a.ndjson", lines(*ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("a.json", lines(*ROWS)),
        ("a.json", json.dumps(COLUMNS)),
        ("a.json", json.dumps(BY_INDEX)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.csv", table(ROWS)),
        ("a.csv", table(ROWS, ";")),
        ("a.tsv", table(ROWS, "\t")),
    ],
)
def test_files_of_every_kind_hold_the_same_rows(tmp_path, name, ending, content):
    assert load_rows(write(tmp_path / (name + ending), packed(content.encode(), ending))) == ROWS


def test_one_row_alone_is_a_row(tmp_path):
    for number, row in enumerate([{"messages": CHAT}, {"text": "a"}, {"turns": ["a", "b"]}]):
        assert load_rows(write(tmp_path / f"{number}.json", json.dumps(row, indent=1))) == [normal(row)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_marks_are_no_text(tmp_path, name, encoding):
    content = {"a.jsonl": lines(*ROWS), "a.json": json.dumps(ROWS), "a.csv": table(ROWS)}[name]
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    assert load_rows(write(tmp_path / name, (mark + content).encode(encoding))) == ROWS


def test_a_mark_where_two_files_were_joined(tmp_path):
    content = lines(ROWS[0]).encode("utf-8-sig") + lines(ROWS[1]).encode("utf-8-sig")
    assert load_rows(write(tmp_path / "a.jsonl", content)) == ROWS


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    path = write(tmp_path / "a.jsonl", r'{"text": "cut \ud83d, whole \ud83d\ude00"}')
    assert load_rows(path) == [{"text": "cut \ufffd, whole \U0001f600"}]


def test_parquet_without_its_nulls(tmp_path):
    tool = {"type": "function", "function": {"name": "clock", "unit": "h"}}
    given = [
        {"messages": CHAT, "text": None, "tools": [CLOCK]},
        {"messages": None, "text": "plain", "tools": None},
        {"messages": CALLED, "text": None, "tools": [tool]},
    ]
    datasets.Dataset.from_list(given).to_parquet(tmp_path / "a.parquet")
    rows = load_rows(str(tmp_path / "a.parquet"))
    assert [row.place for row in rows] == [f"{tmp_path}/a.parquet[{index}]" for index in range(3)]
    assert rows[1] == {"text": "plain"}
    assert rows[2]["messages"] == CALLED and rows[2]["tools"] == [tool]


def test_a_saved_dataset(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "a")
    assert load_rows(str(tmp_path / "a")) == ROWS[:1]
    with pytest.raises(ValueError, match="has the splits train, not 'test'"):
        load_rows(str(tmp_path / "a"), split="test")


def test_all_of_a_folder_is_read_or_named(tmp_path, capsys):
    write(tmp_path / "a.jsonl", lines({"text": "one"}))
    write(tmp_path / "b.json", json.dumps([{"text": "two"}]))
    write(tmp_path / "c.csv", "text\nthree\n")
    datasets.Dataset.from_list([{"text": "four"}]).to_parquet(tmp_path / "d.parquet")
    write(tmp_path / "notes.txt", "no rows")
    write(tmp_path / ".hidden", "")
    (tmp_path / "more").mkdir()
    assert [row["text"] for row in load_rows(str(tmp_path))] == ["one", "two", "three", "four"]
    told = capsys.readouterr().err
    assert re.search(r"not read, because only .*: more, notes.txt\n", told)


def test_what_lies_beside_parquet_is_named(tmp_path, capsys):
    datasets.Dataset.from_list([{"text": "four"}]).to_parquet(tmp_path / "d.parquet")
    write(tmp_path / "notes.txt", "no rows")
    assert load_rows(str(tmp_path)) == [{"text": "four"}]
    assert "notes.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"text": "a"}, {"text"'),
        ("a.json", '{"text": "a"'),
        ("a.json", "text"),
        ("a.jsonl.zst", b"no zstandard"),
        ("a.jsonl.bz2", b"no bzip2"),
        ("a.parquet", b"no parquet"),
        ("a.jsonl", "\ufeff{}".encode("utf-16")[:-1]),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name)) + "(: not valid JSON| is damaged)"):
        load_rows(write(tmp_path / name, content), bad=BadRows(skip=True))


# -- bad rows ----------------------------------------------------------------------------------------------------------

BAD_LINES = [
    ("{", "not valid JSON"),
    ("[1]", "expected a JSON object, got list"),
    (b'{"text": "\xff"}', "not valid JSON (it holds bytes that are not UTF-8)"),
    ("[" * 100_000, "not valid JSON"),
    ('{"text": ' + "9" * 5000 + "}", "not valid JSON"),
    ('{"conversations": []}', "expected a non-empty"),
    ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "its content holds a part of type 'image'"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_one_bad_line_is_an_error_or_skipped_and_named(tmp_path, capsys, line, reason):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {reason}") + ".*--skip-bad-rows"):
        load_rows(path)
    bad = BadRows(skip=True)
    rows = load_rows(path, bad=bad)
    assert [(row["text"], row.number) for row in rows] == [("one", 0), ("two", 2)]
    bad.report(path)
    told = capsys.readouterr().err
    assert "1 bad rows skipped" in told and f"{path}:3: {reason}" in told


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.json", json.dumps([{"text": "one"}, 3, {"text": "two"}]), "[1]"),
        ("a.json", '{"text": "one"}\n{\n{"text": "two"}\n', ":2"),
        ("a.csv", 'text,id\none,1\n"a\nb",2,3\ntwo,3\n', ":3"),
        ("a.csv", 'text,id\none,1\n"a"b,2\ntwo,3\n', ":3"),
        ("a.csv", b"text,id\none,1\n\xff,2\ntwo,3\n", ":3"),
        ("a.csv", "text,id\none,1\n,2\ntwo,3\n", ":3"),
    ],
)
def test_bad_rows_of_other_files_have_a_place_too(tmp_path, name, content, place):
    path, bad = write(tmp_path / name, content), BadRows(skip=True)
    assert [row["text"] for row in load_rows(path, bad=bad)] == ["one", "two"]
    assert [found[0] for found in bad.found] == [f"{path}{place}"]


def test_nothing_but_bad_rows_is_an_error(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", "{\n" * 30)
    bad = BadRows(skip=True)
    with pytest.raises(ValueError, match="holds no rows"):
        load_rows(path, bad=bad)
    told = capsys.readouterr().err
    assert "30 bad rows skipped" in told and "a.jsonl:20" in told and "a.jsonl:21" not in told and "and 10 more" in told


def test_large_files_are_read_line_by_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n' * 3 + "{")
    records = read_source(path, "train")
    assert next(records) == (f"{path}:1", {"text": "one"})
    assert len(load_rows(path, limit=3)) == 3  # what lies behind is not looked at
