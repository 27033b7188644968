"""The target writes a data set's answers: with a tiny one here, and through a server that answers as it is told."""

import dataclasses
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from chat_helpers import masked_runs
from ppow.training import cli, regenerate, slots, writers
from ppow.training.config import RegenerateConfig
from ppow.training.data import encode, load_rows


@pytest.fixture(scope="module")
def pair(tmp_path_factory, save_target):
    folder = tmp_path_factory.mktemp("pair")
    save_target(folder / "target")
    return folder


@pytest.fixture
def chats(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Add one."}, {"role": "assistant", "content": "no"}]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is a fox?"},
                {"role": "assistant", "content": "old"},
                {"role": "user", "content": "And a dog?"},
            ]
        },
        {"text": "no chat"},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_answers_are_the_targets_own_greedy_text(pair, chats, tmp_path):
    out = tmp_path / "answers.jsonl"
    regenerate.main(RegenerateConfig(target=str(pair / "target"), data=str(chats), output=str(out), max_new_tokens=10))
    rows = {row["row"]: row for row in read(out)}
    assert set(rows) == {0, 1}
    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    model = LlamaForCausalLM.from_pretrained(pair / "target")
    messages = rows[0]["messages"]
    ids = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    alone = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    ended = tokenizer.eos_token_id in alone
    text = tokenizer.decode(alone[: alone.index(tokenizer.eos_token_id)] if ended else alone)
    assert messages[1]["content"] == text and rows[0]["complete"] == ended
    roles = [message["role"] for message in rows[1]["messages"]]
    assert roles[:3] == ["system", "user", "assistant"] and "old" != rows[1]["messages"][2]["content"]


def test_finished_answers_lie_in_row_order(tmp_path):
    out = tmp_path / "answers.jsonl"
    rows = [{"row": row, "messages": [], "text": "one\u2028two\x85three\r\n"} for row in (3, 0, 10, 2)]
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")
    regenerate.in_row_order(out)
    assert read(out) == sorted(rows, key=lambda row: row["row"])


def test_an_interrupted_run_continues_after_the_last_whole_line(pair, chats, tmp_path):
    out = tmp_path / "answers.jsonl"
    config = {"target": str(pair / "target"), "data": str(chats), "output": str(out), "max_new_tokens": 5}
    regenerate.main(RegenerateConfig(**config))
    whole = sorted(out.read_text().splitlines())
    out.write_text(out.read_text().splitlines()[0] + '\n{"row": 1, "mess')
    with pytest.raises(ValueError, match="pass --resume"):
        regenerate.main(RegenerateConfig(**config))
    regenerate.main(RegenerateConfig(**config, resume=True))
    assert sorted(out.read_text().splitlines()) == whole
    out.write_text('{"row": 1, "mess')  # killed in its first line
    regenerate.main(RegenerateConfig(**config, resume=True))
    assert sorted(out.read_text().splitlines()) == whole


ANSWERED = [{"role": "user", "content": "Add one."}, {"role": "assistant", "content": "2"}]
BY = {"model": "m", "temperature": 0.0, "max_new_tokens": 512}
OURS = json.dumps({"row": 0, "messages": ANSWERED, "complete": True, "by": BY}) + "\n"


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_kill_changes_no_answer(pair, tmp_path, share):
    """What is sampled follows from the row and the seed, not from the rows beside it."""
    data, whole = tmp_path / "chats.jsonl", tmp_path / "whole.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Add {i} and {'two ' * i}."}) + "\n" for i in range(10)))
    given = {"target": str(pair / "target"), "data": str(data), "output": str(whole), "max_new_tokens": 8}
    config = RegenerateConfig(**given, temperature=1.0, greedy_share=share, batch_size=4)
    regenerate.main(config)
    lines = whole.read_bytes().splitlines(keepends=True)
    torn, config = tmp_path / "torn.jsonl", dataclasses.replace(config, resume=True)
    for kept in ([2, 0], [0, 1, 2, 3, 5], [7, 6, 5, 4, 9]):
        torn.write_bytes(b"".join(lines[i] for i in kept) + lines[8][:30])
        regenerate.main(dataclasses.replace(config, output=str(torn)))
        assert torn.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("reason", [None, "asked for"])
def test_rows_of_a_mix_are_those_of_a_greedy_and_of_a_sampled_run(pair, tmp_path, monkeypatch, reason):
    """Whatever the order and the rows beside it; in batches what is sampled depends on those."""
    monkeypatch.setattr(slots, "obstacle", lambda target: reason)
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"turns": [f"Add {i} and {'two ' * i}.", "Why?"]}) + "\n" for i in range(12)))
    made = {}
    for name, size, options in (
        ("greedy", 3, {}),
        ("sampled", 4, {"temperature": 0.7}),
        ("mixed", 5, {"temperature": 0.7, "greedy_share": 0.5}),
    ):
        config = local(pair, data, tmp_path / f"{name}.jsonl", batch_size=size, seed=3, **options)
        regenerate.main(config)
        made[name] = read(tmp_path / f"{name}.jsonl")
    ways = ["greedy" if config.temperature_of(row) == 0 else "sampled" for row in range(12)]
    assert 3 < ways.count("greedy") < 9 and all(one != other for one, other in zip(made["greedy"], made["sampled"]))
    for row, (way, written) in enumerate(zip(ways, made["mixed"])):
        assert written["by"] == made[way][row]["by"]
        if way == "greedy" or reason is None:
            assert written == made[way][row]
    with pytest.raises(ValueError, match="mixed.jsonl:.* was written by .*, not by .*give another --output"):
        regenerate.main(dataclasses.replace(config, greedy_share=0.9, resume=True))


def test_the_greedy_share_follows_from_seed_and_row():
    def greedy(share, seed=0, temperature=0.8):
        given = {"target": "t", "data": "d", "output": "o", "temperature": temperature}
        config = RegenerateConfig(**given, greedy_share=share, seed=seed)
        found = {row for row in range(10_000) if config.temperature_of(row) == 0}
        assert all(config.temperature_of(row) == temperature for row in range(10_000) if row not in found)
        return found

    assert greedy(None) == greedy(0.0) == set()
    assert len(greedy(1.0)) == len(greedy(1.0, temperature=0.0)) == len(greedy(None, temperature=0.0)) == 10_000
    for share in (0.1, 0.5, 0.75):
        assert abs(len(greedy(share)) - 10_000 * share) < 4 * (10_000 * share * (1 - share)) ** 0.5
    assert greedy(0.5) == greedy(0.5) and greedy(0.1) < greedy(0.5), "a larger share keeps those of a smaller one"
    assert abs(len(greedy(0.5) & greedy(0.5, seed=1)) - 2_500) < 4 * (10_000 * 3 / 16) ** 0.5
    with pytest.raises(ValueError, match="greedy_share=0.5 leaves .* temperature=0 is greedy: give a --temperature ab"):
        greedy(0.5, temperature=0.0)
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"greedy_share must be .*got {share}"):
            greedy(share)


def test_an_endpoint_is_told_each_rows_temperature(server, chats, tmp_path):
    config = dataclasses.replace(endpoint(server[0], chats, tmp_path / "out.jsonl"), temperature=0.7, greedy_share=0.5)
    seeds = (dataclasses.replace(config, seed=seed) for seed in range(99))
    config = next(config for config in seeds if [config.temperature_of(row) for row in (0, 1)] == [0.7, 0.0])
    regenerate.main(config)
    asked = {body["messages"][-1]["content"]: body["temperature"] for _, body, _ in server[1].seen}
    assert asked == {"Add one.": 0.7, "What is a fox?": 0.0, "And a dog?": 0.0}
    assert [row["by"]["temperature"] for row in read(tmp_path / "out.jsonl")] == [0.7, 0.0]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "mine"}\n', 1),
        ('{"text": "mine"}', 1),
        ('{"text": "one"}\n{"text": "two"}', 1),
        ('{"row": 1}\n', 1),
        ("not UTF-8: é\n", 1),
        (OURS + "my notes", 2),
        (OURS + '\n{"row": 1, "mess', 2),
    ],
)
def test_a_file_of_another_kind_is_refused_untouched(chats, tmp_path, content, line):
    out = tmp_path / "out.jsonl"
    out.write_bytes(content.encode("latin-1"))
    config = dataclasses.replace(endpoint("http://127.0.0.1:9/v1", chats, out), resume=True)
    with pytest.raises(ValueError, match=f"out.jsonl:{line} was not written by `ppow regenerate`"):
        regenerate.main(config)
    assert out.read_bytes() == content.encode("latin-1")


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (0, {"content": "Subtract one."}, "answers 'user: Add one.' as row 0, but .* asks 'user: Subtract one.'"),
        (0, {"role": "assistant"}, "answers 'user: Add one.' as row 0, but .* asks 'nothing'"),
        (1, {"content": "Be long."}, "answers 'system: Be brief.' as row 1, but .* asks 'system: Be long.'"),
    ],
)
def test_an_output_of_other_data_is_refused_untouched(server, chats, tmp_path, row, change, message):
    out = tmp_path / "out.jsonl"
    config = endpoint(server[0], chats, out)
    regenerate.main(config)
    out.write_text(out.read_text() + '{"row": 2, "mess')
    before = out.read_bytes()
    rows = read(chats)
    rows[row]["messages"][0] |= change
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message + r"\. .*give another --output"):
        regenerate.main(dataclasses.replace(config, resume=True))
    assert out.read_bytes() == before


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"max_new_tokens": 6}, {"model": "other"}])
def test_answers_of_another_writer_are_not_mixed_in(server, chats, tmp_path, change):
    out = tmp_path / "out.jsonl"
    config = endpoint(server[0], chats, out)
    regenerate.main(config)
    by = {"model": config.model, "temperature": config.temperature, "max_new_tokens": config.max_new_tokens}
    assert [row["by"] for row in read(out)] == [by, by]
    before = out.read_bytes()
    with pytest.raises(ValueError, match="out.jsonl:1 was written by .*, not by .*give another --output"):
        regenerate.main(dataclasses.replace(config, resume=True, **change))
    assert out.read_bytes() == before
    regenerate.main(dataclasses.replace(config, resume=True))


def test_turns_after_an_answer_cut_short_are_not_missed(chats, tmp_path):
    """Row 1 asks twice: without a second answer it is done if the first was cut short, and else of other data."""
    out = tmp_path / "out.jsonl"
    config = dataclasses.replace(endpoint("http://127.0.0.1:9/v1", chats, out), resume=True)
    messages = [*read(chats)[1]["messages"][:2], {"role": "assistant", "content": "A fox is"}]
    whole, short = (json.dumps({"row": 1, "messages": messages, "complete": c, "by": BY}) + "\n" for c in (True, False))
    out.write_text(OURS + whole)
    with pytest.raises(ValueError, match=r"jsonl:2 answers 'nothing' as row 1, but .* asks 'user: And a dog\?'"):
        regenerate.main(config)
    out.write_text(OURS + short)
    regenerate.main(config)
    assert out.read_text() == OURS + short


@pytest.fixture
def server():
    """An OpenAI-compatible endpoint that fails as told: each entry of ``faults`` is used up by one request.

    An entry is a status, the text of an answer that is no JSON, a choice, or None for what it does otherwise: an echo.
    """

    class Handler(BaseHTTPRequestHandler):
        faults, seen = [], []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.seen.append((self.path, body, self.headers.get("Authorization")))
            fault = self.faults.pop(0) if self.faults else None
            status = fault if isinstance(fault, int) else 200
            echo = f"echo {body['messages'][-1]['content']}"
            choice = {"message": {"content": echo}, "finish_reason": "stop"}
            choice = fault if isinstance(fault, dict) else choice
            payload = fault.encode() if isinstance(fault, str) else json.dumps({"choices": [choice]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", Handler
    http.shutdown()
    http.server_close()


def endpoint(url, chats, out):
    return RegenerateConfig(endpoint=url, model="m", data=str(chats), output=str(out), concurrency=1)


def test_an_endpoint_that_stumbles(server, chats, tmp_path, monkeypatch):
    url, handler = server
    monkeypatch.setattr(writers.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    handler.faults[:] = [500, 429]
    regenerate.main(endpoint(url, chats, tmp_path / "out.jsonl"))
    rows = {row["row"]: row["messages"] for row in read(tmp_path / "out.jsonl")}
    assert rows[0][-1] == {"role": "assistant", "content": "echo Add one."}
    assert [m["content"] for m in rows[1]] == [
        "Be brief.",
        "What is a fox?",
        "echo What is a fox?",
        "And a dog?",
        "echo And a dog?",
    ]
    assert all(path == "/v1/chat/completions" and key == "Bearer secret" for path, _, key in handler.seen)
    assert "secret" not in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (400, "refused the request with 400"),
        (422, "refused the request with 422"),
        ("<html>", "not JSON"),
        ('{"no": 1}', "without choices"),
        ("[]", "without choices"),
        ({"message": {}}, "without choices"),
        ({"message": {"content": 3}}, "something else than a message"),
        ({"message": {"tool_calls": ["clock"]}}, "something else than a message"),
    ],
)
def test_an_endpoint_that_refuses_a_request(server, chats, tmp_path, fault, message, capsys):
    """The first request of all: an error, unless bad rows are skipped. A later one: recorded, and not asked again."""
    url, handler = server
    config = endpoint(url, chats, tmp_path / "out.jsonl")
    handler.faults[:] = [fault]
    with pytest.raises(ValueError, match=rf"chats.jsonl:\d: .*{message}.*--skip-bad-rows"):
        regenerate.main(config)
    assert not (tmp_path / "out.jsonl").exists()
    for name, change in (("skipped.jsonl", {"skip_bad_rows": True}), ("later.jsonl", {})):
        handler.faults[:] = [fault] if change else [None, fault]
        config = dataclasses.replace(config, output=str(tmp_path / name), **change)
        regenerate.main(config)
        rows = read(tmp_path / name)
        (failed,) = [row for row in rows if "error" in row]
        assert len(rows) == 2 and not failed["complete"] and failed["finish"] == "error" and message in failed["error"]
        assert f"chats.jsonl:{failed['row'] + 1}: " in capsys.readouterr().err
        handler.seen.clear()
        regenerate.main(dataclasses.replace(config, resume=True))
        assert read(tmp_path / name) == rows and not handler.seen
        config = dataclasses.replace(config, skip_bad_rows=False)


def test_one_refusal_among_several_requests_is_recorded(server, chats, tmp_path):
    """It comes back first, before any answer has shown that the options are right; all refused ones are an error."""
    url, handler = server
    config = dataclasses.replace(endpoint(url, chats, tmp_path / "out.jsonl"), concurrency=2)
    handler.faults[:] = [400]
    regenerate.main(config)
    assert sorted("error" in row for row in read(tmp_path / "out.jsonl")) == [False, True]
    handler.faults[:] = [400, 400]
    with pytest.raises(ValueError, match="refused the request with 400"):
        regenerate.main(dataclasses.replace(config, output=str(tmp_path / "other.jsonl")))
    assert not (tmp_path / "other.jsonl").exists()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_every_request_would_meet_ends_the_run(server, chats, tmp_path, status):
    url, handler = server
    handler.faults[:] = [status]
    with pytest.raises(ValueError, match=f"refused the request with {status}"):
        regenerate.main(dataclasses.replace(endpoint(url, chats, tmp_path / "out.jsonl"), skip_bad_rows=True))


def test_a_request_that_makes_the_server_fail_again_and_again(server, chats, tmp_path, monkeypatch):
    url, handler = server
    monkeypatch.setattr(writers.time, "sleep", lambda seconds: None)
    handler.faults[:] = [None, *[500] * 5]
    regenerate.main(endpoint(url, chats, tmp_path / "out.jsonl"))
    assert sum("failed at the request with 500" in row.get("error", "") for row in read(tmp_path / "out.jsonl")) == 1


CALLS = [{"id": "7", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}]
PARSED = [{"id": "7", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]


@pytest.mark.parametrize(
    ("choice", "message", "finish", "complete"),
    [
        ({"message": {"content": "one"}, "finish_reason": "stop"}, {"content": "one"}, None, True),
        ({"message": {"content": "one"}}, {"content": "one"}, None, True),
        ({"message": {"content": "one"}, "finish_reason": "eos_token"}, {"content": "one"}, None, True),
        ({"message": {"content": None}, "finish_reason": "stop"}, {"content": ""}, None, True),
        ({"message": {"content": "on"}, "finish_reason": "length"}, {"content": "on"}, "length", False),
        ({"message": {"content": "on"}, "finish_reason": "abort"}, {"content": "on"}, "abort", False),
        ({"message": {"content": ""}, "finish_reason": "content_filter"}, {"content": ""}, "content_filter", False),
        (
            {"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"},
            {"content": "No."},
            "refusal",
            True,
        ),
        (
            {"message": {"content": "one", "reasoning_content": "Well."}, "finish_reason": "stop"},
            {"content": "one", "reasoning_content": "Well."},
            None,
            True,
        ),
        (
            {"message": {"content": None, "reasoning": "Well"}, "finish_reason": "length"},
            {"content": "", "reasoning_content": "Well"},
            "length",
            False,
        ),
        (
            {"message": {"content": None, "tool_calls": CALLS}, "finish_reason": "tool_calls"},
            {"content": None, "tool_calls": PARSED},
            "tool_calls",
            True,
        ),
        (
            {"message": {"content": None, "function_call": CALLS[0]["function"]}, "finish_reason": "function_call"},
            {"content": None, "tool_calls": [{k: PARSED[0][k] for k in ("type", "function")}]},
            "tool_calls",
            True,
        ),
    ],
)
def test_an_answer_is_recorded_for_what_it_is(server, chats, tmp_path, choice, message, finish, complete):
    """Row 1 asks twice: a chat goes on only after an answer that ended by itself."""
    url, handler = server
    config = endpoint(url, chats, tmp_path / "out.jsonl")
    handler.faults[:] = [choice, choice]
    regenerate.main(config)
    one, two = read(tmp_path / "out.jsonl")
    for row, before in ((one, 1), (two, 2)):
        assert row["messages"][before] == {"role": "assistant", **message}
    assert (one.get("finish"), one["complete"]) == (finish, complete)
    assert len(two["messages"]) == (5 if finish is None else 3)
    handler.seen.clear()
    regenerate.main(dataclasses.replace(config, resume=True))
    assert not handler.seen and read(tmp_path / "out.jsonl") == [one, two]


TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
WITH_TOOLS = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": PARSED},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ],
    "tools": [TOOL],
    "enable_thinking": False,
}


def test_turns_of_developers_and_tools_are_kept(server, tmp_path):
    url, handler = server
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps(WITH_TOOLS) + "\n")
    regenerate.main(endpoint(url, data, tmp_path / "out.jsonl"))
    (row,) = read(tmp_path / "out.jsonl")
    assert [m["role"] for m in row["messages"]] == [m["role"] for m in WITH_TOOLS["messages"]]
    assert row["messages"][2] == {**WITH_TOOLS["messages"][2], "weight": 0}, "it belongs to the tool's answer"
    assert [row["messages"][i]["content"] for i in (4, 6)] == ["echo noon", "echo Sure?"]
    assert row["tools"] == [TOOL] and row["chat_template_kwargs"] == {"enable_thinking": False}
    first, second = (body for _, body, _ in handler.seen)
    assert first["tools"] == [TOOL] and first["chat_template_kwargs"] == {"enable_thinking": False}
    assert first["messages"][2] == {"role": "assistant", "content": None, "tool_calls": CALLS}
    assert first["messages"][3] == {"role": "tool", "content": "noon", "tool_call_id": "7"}
    assert [m["role"] for m in second["messages"]] == ["developer", "user", "assistant", "tool", "assistant", "user"]
    changed = {**WITH_TOOLS, "tools": [{**TOOL, "strict": True}]}
    data.write_text(json.dumps(changed) + "\n")
    with pytest.raises(ValueError, match="as row 0, but row 0 of --data asks .*'strict': True"):
        regenerate.main(dataclasses.replace(endpoint(url, data, tmp_path / "out.jsonl"), resume=True))


def test_a_thought_is_not_sent_back(server, chats, tmp_path):
    url, handler = server
    handler.faults[:] = [None, {"message": {"content": "one", "reasoning_content": "Well."}, "finish_reason": "stop"}]
    regenerate.main(endpoint(url, chats, tmp_path / "out.jsonl"))
    assert handler.seen[-1][1]["messages"][2] == {"role": "assistant", "content": "one"}


@pytest.mark.parametrize(
    ("roles", "given"),
    [
        ("user", ["user"]),
        ("user assistant user", ["user", "user"]),
        ("user user", ["user", "user"]),
        ("system user assistant", ["system user"]),
        ("system developer user", ["system developer user"]),
        ("assistant user assistant", ["user"]),
        ("user system assistant", ["user system"]),
        ("user assistant system user", ["user", "system user"]),
        ("user assistant system", ["user"]),
        ("user assistant assistant user", ["user", "user"]),
        ("user assistant", ["user"]),
        ("user assistant tool assistant", ["user assistant tool"]),
        ("user assistant tool tool assistant user", ["user assistant tool tool", "user"]),
        ("user assistant tool assistant tool assistant", ["user assistant tool assistant tool"]),
        ("user assistant tool", ["user assistant tool"]),
        ("user assistant user assistant tool", ["user", "user assistant tool"]),
        ("assistant", []),
        ("system", []),
        ("system assistant", []),
    ],
)
def test_what_is_given_before_each_answer(roles, given):
    found = regenerate.turns([{"role": role, "content": ""} for role in roles.split()])
    assert [" ".join(message["role"] for message in part) for part in found] == given


def test_bad_rows_keep_their_number(server, chats, tmp_path, capsys):
    url, handler = server
    chats.write_text("{\n" + chats.read_text())
    config = endpoint(url, chats, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="chats.jsonl:1: not valid JSON"):
        regenerate.main(config)
    regenerate.main(dataclasses.replace(config, skip_bad_rows=True))
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == [1, 2]
    told = capsys.readouterr().err
    assert "1 bad rows skipped" in told and "chats.jsonl:1: not valid JSON" in told
    assert "1 rows left out: they have no user turn to answer" in told
    mended = {"messages": [{"role": "user", "content": "New?"}]}
    lines = chats.read_text().splitlines(keepends=True)
    chats.write_text("".join([json.dumps(mended) + "\n", *lines[1:]]))
    regenerate.main(dataclasses.replace(config, resume=True))
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == [0, 1, 2]


def test_the_same_data_elsewhere_is_the_same_data(server, chats, tmp_path):
    url, handler = server
    regenerate.main(endpoint(url, chats, tmp_path / "out.jsonl"))
    handler.seen.clear()
    shutil.move(chats, tmp_path / "moved.jsonl")
    regenerate.main(dataclasses.replace(endpoint(url, tmp_path / "moved.jsonl", tmp_path / "out.jsonl"), resume=True))
    assert not handler.seen


# -- a target that is loaded here --------------------------------------------------------------------------------------


def local(pair, data, out, **options):
    given = {"target": str(pair / "target"), "data": str(data), "output": str(out), "max_new_tokens": 6}
    return RegenerateConfig(**given, **options)


def test_a_prompt_that_does_not_fit_the_targets_positions(pair, tiny_tokenizer, chats, tmp_path, capsys):
    def chat(words):
        return [{"role": "user", "content": "word " * words}]

    def tokens(words):
        return len(tiny_tokenizer.apply_chat_template(chat(words), add_generation_prompt=True)["input_ids"])

    near = next(words for words in range(500) if tokens(words + 1) > 511)
    rows = [{"messages": chat(600)}, {"messages": [*chat(near), {"role": "assistant", "content": ""}, *chat(1)]}]
    chats.write_text(chats.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"jsonl:4: a prompt of \d+ tokens does not fit the target's 512 pos.*--skip"):
        regenerate.main(local(pair, chats, tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()
    regenerate.main(local(pair, chats, tmp_path / "out.jsonl", skip_bad_rows=True))
    rows = {row["row"]: row for row in read(tmp_path / "out.jsonl")}
    assert list(rows) == [0, 1, 3, 4]
    assert rows[3]["messages"] == chat(600) and "512 positions" in rows[3]["error"]
    assert "chats.jsonl:4: a prompt of" in capsys.readouterr().err
    assert rows[4]["finish"] == "length" and len(rows[4]["messages"]) == 2, "the answer has what room there is"
    before = (tmp_path / "out.jsonl").read_bytes()
    regenerate.main(local(pair, chats, tmp_path / "out.jsonl", resume=True))  # it is recorded, so no longer in the way
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_thought_that_the_prompt_opens_belongs_to_the_answer(pair, chats, tmp_path):
    folder = tmp_path / "thinks"
    shutil.copytree(pair, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    tokenizer.chat_template = (
        "{{ options or '' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ '<|im_start|>assistant:' + m['content'].split('</think>')[-1] + '<|im_end|>' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:<think>\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder / "target")
    rows = read(chats)
    chats.write_text(json.dumps({**rows[0], "chat_template_kwargs": {"options": "brief! "}}) + "\n")
    regenerate.main(local(folder, chats, tmp_path / "out.jsonl"))
    (row,) = read(tmp_path / "out.jsonl")
    answer = row["messages"][1]["content"]
    assert answer.startswith("<think>\n")
    ids = tokenizer("brief! <|im_start|>user:Add one.<|im_start|>assistant:<think>\n", return_tensors="pt")["input_ids"]
    model = LlamaForCausalLM.from_pretrained(folder / "target")
    written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert answer == "<think>\n" + tokenizer.decode(written)
    (example,) = encode(load_rows(str(tmp_path / "out.jsonl")), tokenizer, 512)
    assert masked_runs(example, tokenizer) == [tokenizer.decode(written).strip()]


def test_the_command_tells_the_format_of_rows(capsys):
    for command in ("regenerate", "supervised", "reinforce"):
        with pytest.raises(SystemExit):
            cli.run([command, "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert "conversations (from, value)" in told and "docs/data.md" in told and "--[no-]skip-bad-rows" in told


def test_an_endpoint_that_is_down_leaves_no_file(server, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(writers.time, "sleep", lambda seconds: None)
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="Is the server up"):
        regenerate.main(endpoint("http://127.0.0.1:9/v1", chats, out))
    assert not out.exists()
    regenerate.main(endpoint(server[0], chats, out))
    assert len(read(out)) == 2
