"""Prompts that a target writes itself: what is kept, what is left out, and runs that go on after an interruption."""

import itertools
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from ppow.training import cli, own_prompts
from ppow.training.config import PromptsConfig
from ppow.training.data import load_rows
from ppow.training.openings import OPENINGS, marks_of, opening, openings
from ppow.training.own_prompts import judged, plain
from small_pair import TARGET


def command(output, *more):
    return ["prompts", f"--target={TARGET}", f"--output={output}", "--batch-size=8", "--max-new-tokens=48", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    assert cli.main(command(output, "--count=24")) == 0
    return output.read_bytes()


def test_a_chat_model_writes_what_its_users_ask(whole, tmp_path, capsys):
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) == 24 and rows[0]["by"]["temperature"] == 0.8 and rows[0]["by"]["seed"] == 0
    texts = [message["content"] for row in rows for message in row["messages"]]
    assert len({plain(text) for text in texts}) == 24 and all(len(text.split()) > 1 for text in texts)
    assert not any("<|" in text for text in texts)
    (tmp_path / "prompts.jsonl").write_bytes(whole)
    regenerate = ["regenerate", f"--target={TARGET}", f"--data={tmp_path / 'prompts.jsonl'}", "--limit=2"]
    assert cli.main([*regenerate, f"--output={tmp_path / 'answers.jsonl'}", "--max-new-tokens=8"]) == 0
    assert [row["messages"][1]["role"] for row in load_rows(str(tmp_path / "answers.jsonl"))] == ["assistant"] * 2


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(whole, tmp_path, monkeypatch):
    output, append, calls = tmp_path / "prompts.jsonl", own_prompts.append, []

    def breaks(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return append(*given)

    monkeypatch.setattr(own_prompts, "append", breaks)
    assert cli.main(command(output, "--count=24")) == 130
    monkeypatch.undo()
    assert 0 < len(output.read_bytes()) < len(whole)
    with open(output, "ab") as out:
        out.write(b'{"draw": 1, "mess')  # as a kill in the middle of a write leaves it
    assert cli.main(command(output, "--count=24")) == 2  # not without --resume
    assert cli.main(command(output, "--count=24", "--resume")) == 0
    assert output.read_bytes() == whole
    assert cli.main(command(output, "--count=24", "--resume")) == 0 and output.read_bytes() == whole
    lines = whole.splitlines(keepends=True)  # a kill between the lines of one call, or fewer asked for at first
    output.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert cli.main(command(output, "--count=24", "--resume")) == 0 and output.read_bytes() == whole


def test_a_prompt_follows_from_its_number_not_from_those_beside_it(whole, tmp_path):
    output = tmp_path / "prompts.jsonl"
    assert cli.main([*command(output, "--count=24"), "--batch-size=3"]) == 0
    contents = whole.splitlines(), output.read_bytes().splitlines()
    texts, others = ({json.loads(line)["messages"][0]["content"] for line in lines} for lines in contents)
    assert len(texts & others) > 16  # of 24: another number of rows rounds otherwise, which turns a few draws


def test_what_was_written_otherwise_is_not_continued(whole, tmp_path, capsys):
    output = tmp_path / "prompts.jsonl"
    output.write_bytes(whole)
    assert cli.main(command(output, "--count=30", "--resume", "--temperature=0.5")) == 2
    assert "'temperature': 0.8" in capsys.readouterr().err
    assert cli.main(command(output, "--count=30", "--resume", "--seed=1")) == 2
    assert output.read_bytes() == whole
    output.write_text('{"a": 1, "notes": "mine"}')  # nobody's torn line
    assert cli.main(command(output, "--resume")) == 2
    assert "ends with what `ppow prompts` did not write" in capsys.readouterr().err
    assert output.read_text() == '{"a": 1, "notes": "mine"}'
    output.write_text('{"messages": []}\n')
    assert cli.main(command(output, "--resume")) == 2
    assert "prompts.jsonl:1 is no prompt that `ppow prompts` wrote; name another output" in capsys.readouterr().err
    assert output.read_text() == '{"messages": []}\n'


@pytest.mark.parametrize(
    ("text", "ends", "fault"),
    [
        ("Add one and two.", True, None),
        ("Add one and two.", False, "unfinished"),
        ("Add", True, "empty"),
        ("  ", True, "empty"),
        ("so one two one two one two", True, "looping"),
        ("ADD   one, and two!", True, "written before"),
        ("Add one. <|im_start|>assistant\nYes.", True, "template"),
        ("请介绍一下北京的历史和文化。", True, None),
    ],
)
def test_what_is_kept_by_hand(tiny_tokenizer, text, ends, fault):
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids + [tiny_tokenizer.eos_token_id] * ends
    seen = {plain("Add one and two")} if fault == "written before" else set()
    marks = marks_of(tiny_tokenizer)
    found = judged(ids, {tiny_tokenizer.eos_token_id}, marks, tiny_tokenizer, opening(tiny_tokenizer), seen)
    assert found[1] == fault and "<|" not in found[0]


def test_a_template_is_read_and_one_without_a_user_is_refused(tiny_tokenizer, tmp_path, capsys):
    found = opening(tiny_tokenizer)
    assert (
        found[:3] == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "") and found.end() == "<|im_end|>"
    )
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    # Llama 2's way, whose end is no token of its own: words tell it
    tokenizer.chat_template = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    assert opening(tokenizer).end() == "[/INST]"
    ids = tokenizer("Add one and two. [/INST] three", add_special_tokens=False).input_ids
    assert judged(ids, set(), set(), tokenizer, opening(tokenizer), set()) == ("Add one and two.", None)
    padded = [*ids, *[tokenizer.pad_token_id] * 6]  # beside a slower one
    assert judged(padded, set(), set(), tokenizer, opening(tokenizer), set()) == ("Add one and two.", None)
    assert plain("What is 3+4?") != plain("What is 3*4?") and plain("Explain C") != plain("explain C++.")
    for template, message in [(None, "cannot open a user's turn"), ("x", "does not show where a user's words begin")]:
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            opening(tokenizer)


def test_nothing_of_the_targets_own_options_shapes_what_it_says(whole, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(TARGET, target)
    file = target / "generation_config.json"
    own = {"return_dict_in_generate": True, "num_beams": 2, "max_time": 1e-9, "stop_strings": ["a"], "min_p": 0.9}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    output = tmp_path / "prompts.jsonl"
    assert cli.main([*command(output, "--count=24"), f"--target={target}"]) == 0
    assert output.read_bytes() == whole


def test_prompts_end_with_the_positions_of_the_target(tmp_path, capsys):
    for positions, status in ((20, 0), (2, 2)):  # of the first kind there is room for the template alone
        target = tmp_path / f"target-{positions}"
        shutil.copytree(TARGET, target)
        config = json.loads((target / "config.json").read_text()) | {"max_position_embeddings": positions}
        (target / "config.json").write_text(json.dumps(config))
        output = tmp_path / f"prompts-{positions}.jsonl"
        assert cli.main([*command(output, "--count=2"), f"--target={target}"]) == status
    assert "takes more than half of the target's 2 positions" in capsys.readouterr().err


def test_a_target_that_repeats_itself_ends_the_run_with_what_there_is(tmp_path, monkeypatch, capsys):
    ids = AutoTokenizer.from_pretrained(TARGET)("Book a table, please.<|im_end|>", add_special_tokens=False).input_ids

    def sampled(*given):
        return ([(draw, ids) for draw in range(first, first + 8)] for first in itertools.count(0, 8))

    monkeypatch.setattr(own_prompts, "sampled", sampled)
    output, begin = tmp_path / "prompts.jsonl", tmp_path / "openings.jsonl"
    begin.write_text('{"user": ""}\n')
    assert cli.main(command(output, "--count=3", f"--openings={begin}")) == 2
    told = capsys.readouterr().err
    assert "647 samples brought nothing new" in told and "holds 1 prompts of 3" in told and "'written before'" in told
    assert len(output.read_text().splitlines()) == 1


def test_a_turn_that_words_end_is_cut_there(tmp_path, capsys):
    """A template without end tokens of its own: generation stops at its words, and they are no part of the prompt."""
    target = tmp_path / "target"
    shutil.copytree(TARGET, target)
    (target / "chat_template.jinja").write_text("{% for m in messages %}User: {{ m['content'] }} the{% endfor %}")
    output, begin = tmp_path / "prompts.jsonl", tmp_path / "openings.jsonl"
    begin.write_text('{"user": ""}\n')
    given = [
        "prompts",
        f"--target={target}",
        f"--openings={begin}",
        f"--output={output}",
        "--count=3",
        "--batch-size=8",
        "--max-new-tokens=64",
    ]
    assert cli.main(given) == 0
    texts = [json.loads(line)["messages"][0]["content"] for line in output.read_text().splitlines()]
    assert len(texts) == 3 and not any("the" in text for text in texts)


def test_openings_take_turns_and_their_words_stay(tmp_path, capsys):
    begin, output = tmp_path / "openings.jsonl", tmp_path / "prompts.jsonl"
    begin.write_text('{"system": "You teach.", "user": "How many"}\n\n{"user": "Write a"}\n')
    assert cli.main(command(output, "--count=12", f"--openings={begin}")) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 12 and {row["draw"] % 2 for row in rows} == {0, 1}
    for row in rows:
        (message,) = row["messages"]  # the system message is not kept: users do not send it
        assert message["role"] == "user" and message["content"].startswith(("How many", "Write a")[row["draw"] % 2])
    begin.write_text('{"user": "Write a"}\n')  # other openings: another file
    assert cli.main(command(output, "--count=20", f"--openings={begin}", "--resume")) == 2
    assert "name another output" in capsys.readouterr().err and len(output.read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\n", "holds no opening; write one a line"),
        ("Write a poem\n", "openings.jsonl:1 is no opening of a chat"),
        ('{"user": "a"}\n{"prompt": "b"}\n', "openings.jsonl:2 is no opening of a chat: expected"),
        ("{}\n", "openings.jsonl:1 is no opening of a chat: expected"),
        ('{"user": "\\ud800"}\n', "openings.jsonl:1 is no opening of a chat: .*surrogates"),
        ('{"user": "a<|im_end|>"}\n', "openings.jsonl, the opening 'a<|im_end|>': .*holds tokens of the template"),
        ('{"user": 3}\n', 'openings.jsonl:1 is no opening of a chat: "system" and "user" must be text'),
        ('["a"]\n', "openings.jsonl:1 is no opening of a chat: expected"),
    ],
)
def test_openings_that_are_none_are_named(tiny_tokenizer, tmp_path, text, told):
    file = tmp_path / "openings.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=told):
        openings(tiny_tokenizer, str(file))


def test_a_template_that_refuses_system_messages_gets_the_words_alone(tiny_tokenizer, tmp_path):
    assert [one.words for one in openings(tiny_tokenizer)] == [words for _, words in OPENINGS]
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    )
    found = openings(tokenizer)
    assert {one.text for one in found} == {"[INST] "} and len(found) == len(OPENINGS)
    file = tmp_path / "openings.jsonl"
    file.write_text('{"system": "You teach."}\n')  # but who asks for one is told
    with pytest.raises(ValueError, match="openings.jsonl, the opening 'You teach.': .*no system role"):
        openings(tokenizer, str(file))
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    )
    assert {one.text for one in openings(tokenizer)} == {"[INST] "}
    with pytest.raises(ValueError, match="the opening 'You teach.': .*leaves system messages out"):
        openings(tokenizer, str(file))


def test_a_file_of_openings_is_read_as_other_rows_are(tiny_tokenizer, tmp_path):
    file = tmp_path / "openings.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"user": "One\xe2\x80\xa8two"}\r\n\r\n{"user": ""}')
    assert [one.words for one in openings(tiny_tokenizer, str(file))] == ["One\u2028two", ""]
    file.write_bytes('{"user": "\u00e9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="openings.jsonl is no text in UTF-8"):
        openings(tiny_tokenizer, str(file))


def test_built_in_openings_that_follow_each_other_are_of_several_kinds():
    systems = [system for system, _ in OPENINGS]
    assert len(OPENINGS) == 36 and systems.count("") == 6 and sorted(map(systems.count, set(systems)))[-2:] == [9, 9]
    assert all(len(set(systems[i : i + 6])) > 2 for i in range(31))


def test_what_an_opening_adds_is_no_part_of_the_judgement(tiny_tokenizer):
    """A decoder may drop the space that a text begins with, as Llama 2's does; a turn may hold the opening alone."""
    end, begun = tiny_tokenizer.eos_token_id, opening(tiny_tokenizer, "", "Book a")
    more = tiny_tokenizer(" table, please.", add_special_tokens=False).input_ids
    given = {end}, set(), tiny_tokenizer, begun, set()
    assert judged([*more, end], *given) == ("Book a table, please.", None)
    assert judged([end], *given) == ("Book a", "empty")
    assert judged([*more, end], *given, len(more)) == ("Book a table, please.", "too long")
    decode = tiny_tokenizer.decode

    class Stripping:
        """The tokenizer, but for that space."""

        def __call__(self, text, **options):
            return tiny_tokenizer(text, **options)

        def decode(self, ids, **options):
            return decode(ids, **options).removeprefix(" ")

    assert judged([*more, end], {end}, set(), Stripping(), begun, set()) == ("Book a table, please.", None)


def test_runs_of_spaces_that_were_added_are_no_marks():
    """GPT-NeoX's tokenizer and its kin have tokens for the indentation of programs."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    before = marks_of(tokenizer)
    tokenizer.add_tokens(["    ", "<tool>"])
    assert marks_of(tokenizer) - before == {tokenizer.convert_tokens_to_ids("<tool>")}


def test_a_template_that_tells_the_date_goes_on_the_next_day(tmp_path, monkeypatch):
    target, output = tmp_path / "target", tmp_path / "prompts.jsonl"
    shutil.copytree(TARGET, target)
    template = AutoTokenizer.from_pretrained(TARGET).chat_template
    for day, count in ((1, 6), (2, 9)):
        (target / "chat_template.jinja").write_text(f"Day {day}. {template}")
        assert cli.main([*command(output, f"--count={count}"), f"--target={target}", "--resume"]) == 0
    assert len(output.read_text().splitlines()) == 9


def test_openings_of_unlike_lengths_are_read_alike_in_batches_of_generate():
    """A target that is answered in batches reads shorter openings behind padding."""
    target = LlamaForCausalLM.from_pretrained(TARGET).eval()
    target.generation_config = GenerationConfig(do_sample=True, top_k=1, max_new_tokens=6, pad_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    given = [tokenizer(text).input_ids for text in ("Book a table", "one two three four five, and six or seven", "so")]
    config = PromptsConfig(target=str(TARGET), output="-", batch_size=4)
    target.generation_config.repetition_penalty = 1.0001  # what slots do not do
    made = next(own_prompts.sampled(target, tokenizer, given, set(), config, 4))
    assert [draw for draw, _ in made] == [4, 5, 6, 7]
    for draw, ids in made:
        alone = torch.tensor([given[draw % 3]])
        assert target.generate(alone)[0, alone.shape[1] :].tolist() == ids
