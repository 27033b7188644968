"""``ppow evaluate --endpoint``: figures from a server's own counters, in the formats that the engines write."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ppow.training import cli, served
from ppow.training.served import counters

VLLM = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {drafts}.0
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{{engine="0",model_name="m"}} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {drafted}.0
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="0"}} {first}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="1"}} {second}.0
"""
SGLANG = """# TYPE sglang:spec_accept_length gauge
sglang:spec_accept_length{{model_name="m"}} 2.75
# TYPE sglang:spec_verify_calls_total counter
sglang:spec_verify_calls_total{{model_name="m",engine_type="unified"}} {drafts}.0
"""


class FakeServer:
    """Answers of 9 tokens in 4 verifications that accept 5 of 8 drafts: 3 at the first place, 2 at the second."""

    def __init__(self, engine: str):
        self.engine, self.asked, self.answers = engine, [], 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                page = {"vllm": VLLM, "sglang": SGLANG}.get(engine)
                self.send_response(404 if page is None else 200)
                self.end_headers()
                n = 10 + fake.answers  # it has served others before
                figures = {"drafts": 4 * n, "drafted": 8 * n, "accepted": 5 * n, "first": 3 * n, "second": 2 * n}
                self.wfile.write((page or "").format(**figures).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append((self.path, body))
                fake.answers += 1
                choice = {"text": "done"} if "prompt" in body else {"message": {"role": "assistant", "content": "done"}}
                reply = {"choices": [choice], "usage": {"completion_tokens": 9}}
                if engine == "llama.cpp":
                    reply["timings"] = {"draft_n": 8, "draft_n_accepted": 5}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(reply).encode())

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def fake(request, monkeypatch):
    monkeypatch.setattr(served, "SETTLED", 0.0)
    server = FakeServer(request.param)
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"id": "a", "category": "x", "turns": ["First?", "And then?"]},
        {"id": "b", "category": "x", "turns": ["def add(a, b):"], "raw_completion": True},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(fake, questions, out, *more) -> int:
    command = [
        "evaluate",
        "--endpoint",
        fake.url,
        "--model",
        "m",
        "--prompts",
        str(questions),
        "--output-dir",
        str(out),
    ]
    return cli.main([*command, "--temperatures", "0", "--max-new-tokens", "9", "--warmup", "1", *more])


@pytest.mark.parametrize(
    ("fake", "length", "engine_length", "per_position"),
    [
        ("vllm", 8 / 4, 1 + 5 / 4, [3 / 4, 2 / 3]),  # 8 tokens behind the first in 4 windows; 5 of 8 drafts accepted
        ("sglang", 8 / 4, 8 / 4, []),
        ("llama.cpp", 8 / 3, 1 + 5 / 3, []),  # 8 tokens, 5 of them drafts: 3 verifications
    ],
    indirect=["fake"],
)
def test_figures_come_from_the_servers_own_counters(
    fake, questions, tmp_path, capsys, length, engine_length, per_position
):
    assert run(fake, questions, tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    ((title, figures),) = metrics["results"].items()
    assert title.endswith("T=0") and metrics["server"]["counters"] == fake.engine
    assert figures["prompts"] == 2 and figures["samples"] == 3  # one has two turns
    assert figures["acceptance_length"] == pytest.approx(length)
    assert figures["acceptance_length_95"] == pytest.approx([length, length])
    assert figures["engine_acceptance_length"] == pytest.approx(engine_length)
    assert figures["per_position"] == pytest.approx(per_position)
    shown = capsys.readouterr().out
    assert f"| 2 | {length:.2f} ({length:.2f}-{length:.2f}) | - | - |" in shown and f"| {engine_length:.2f} |" in shown
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [answer["tokens"] for answer in answers] == [9, 9, 9] and answers[0]["text"] == "done"
    # the warm-up, then the turns of the first prompt, the second behind the server's own answer, then the raw text
    (_, first), (_, second), (path, raw) = fake.asked[-3:]
    assert len(fake.asked) == 5 and first["temperature"] == 0 and first["max_tokens"] == 9
    assert [message["content"] for message in second["messages"]] == ["First?", "done", "And then?"]
    assert path == "/v1/completions" and raw["prompt"] == "def add(a, b):"


@pytest.mark.parametrize("fake", ["plain"], indirect=True)
def test_a_server_without_a_drafter_has_its_speed_measured(fake, questions, tmp_path, capsys):
    assert run(fake, questions, tmp_path / "out") == 0
    (figures,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"].values()
    assert figures["tokens_per_second"] > 0 and "acceptance_length" not in figures
    assert "tells of no drafter" in capsys.readouterr().out


@pytest.mark.parametrize("fake", ["vllm"], indirect=True)
def test_a_folder_that_holds_something_is_left_alone(fake, questions, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert run(fake, questions, tmp_path / "out") == 2
    assert "holds mine.txt" in capsys.readouterr().err and not fake.asked


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--drafter", "d"], "the server decides these: leave drafter out"),
        (["--window-size", "4", "--no-reference"], "leave reference, window_size out"),
    ],
)
@pytest.mark.parametrize("fake", ["vllm"], indirect=True)
def test_what_the_server_decides_is_refused(fake, questions, tmp_path, capsys, more, message):
    assert run(fake, questions, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err and not fake.asked


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--target", "t"], "needs --target and --drafter, or the --endpoint"),
        (["--endpoint", "localhost:8000", "--model", "m"], "--endpoint is a URL such as"),
        (["--endpoint", "http://localhost:8000/v1"], "--model names what it serves"),
    ],
)
def test_mistakes_on_the_command_line(argv, message, tmp_path, capsys):
    assert cli.main(["evaluate", *argv, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_counters_of_several_engines_are_added_and_other_lines_passed_over():
    page = VLLM.format(drafts=4, drafted=8, accepted=5, first=3, second=2)
    page += page.replace('engine="0"', 'engine="1"') + "process_cpu_seconds_total 3.5\nnonsense\n"
    found = counters(page)
    assert found["vllm:spec_decode_num_drafts_total"] == 8
    assert found["vllm:spec_decode_num_accepted_tokens_per_pos_total", 1] == 4
    assert len(found) == 5
