import collections
import gzip
import json
import lzma
import re

import pytest
import torch

from chat_helpers import masked_runs, with_template
from ppow.training.chats import Chat
from ppow.training.data import (
    Example,
    batch_indices,
    draft_vocabulary,
    encode,
    load_rows,
    make_batch,
)

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one and two?"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "and four?"},
    {"role": "assistant", "content": "seven — é"},
]
# The same text as the fixture's ChatML, without generation blocks.
UNMARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3: an empty reasoning block stands before the last answer only, and reasoning of earlier answers is dropped.
REASONING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set body = m['content'].split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ body + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# -- rows --------------------------------------------------------------------------------------------------------------

ROWS = [{"messages": CHAT}, {"text": "a text"}, {"text": "another", "id": 3}]
LINES = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"


@pytest.mark.parametrize(("name", "opener"), [("a.jsonl", open), ("a.jsonl.gz", gzip.open), ("a.jsonl.xz", lzma.open)])
def test_files_are_read_whatever_their_compression(tmp_path, name, opener):
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(LINES)
    assert load_rows(str(tmp_path / name)) == ROWS
    assert load_rows(str(tmp_path / name), limit=2) == ROWS[:2]


def test_a_folder_is_read_in_name_order(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n')
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "README.md").write_text("not data")
    assert [row["text"] for row in load_rows(str(tmp_path))] == ["first", "second"]


def test_a_dataset_folder_goes_through_datasets(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[1:3]}]).to_parquet(tmp_path / "train.parquet")
    assert load_rows(str(tmp_path)) == [{"messages": CHAT}, {"messages": CHAT[1:3]}]
    assert load_rows(str(tmp_path), limit=1) == [{"messages": CHAT}]
    with pytest.raises(ValueError, match="Unknown split"):
        load_rows(str(tmp_path), split="test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a.jsonl:2: not valid JSON"),
        ("[1]", r"a.jsonl:2: expected a JSON object, got list"),
        ('{"conversations": []}', r"a.jsonl:2: .* got \[\] as 'conversations' beside"),
        ('{"text": ""}', r"a.jsonl:2: expected a non-empty"),
        ('{"messages": []}', r"a.jsonl:2: expected a non-empty"),
        ('{"text": "a", "messages": "b"}', r"a.jsonl:2: expected a non-empty"),
        ('{"messages": [{"role": "user"}]}', r"a.jsonl:2: a message is"),
        ('{"messages": [{"role": "user", "content": null}]}', r"a.jsonl:2: a message is"),
        ('{"messages": ["hello"]}', r"a.jsonl:2: a message is"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_rows(str(path))


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jsonl does not exist"):
        load_rows(str(tmp_path / "gone.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        load_rows(str(tmp_path / "empty.jsonl"))
    (tmp_path / "table.xls").write_text("a,b")
    with pytest.raises(ValueError, match="convert it to one JSON object per line"):
        load_rows(str(tmp_path / "table.xls"))
    (tmp_path / "not.jsonl.gz").write_text("plain text")
    with pytest.raises(ValueError, match="damaged or not what its name says"):
        load_rows(str(tmp_path / "not.jsonl.gz"))
    with lzma.open(tmp_path / "cut.jsonl.xz", "wt") as file:
        file.write(LINES * 50)
    (tmp_path / "cut.jsonl.xz").write_bytes((tmp_path / "cut.jsonl.xz").read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged or not what its name says"):
        load_rows(str(tmp_path / "cut.jsonl.xz"))
    with pytest.raises(OSError, match="org/no-such-dataset"):
        load_rows("org/no-such-dataset")


# -- the loss mask -----------------------------------------------------------------------------------------------------


def test_generation_blocks_mark_the_answers_and_their_end_of_turn(tiny_tokenizer):
    (example,) = encode([{"messages": CHAT}], tiny_tokenizer, 512)
    assert masked_runs(example, tiny_tokenizer) == ["three<|im_end|>", "seven — é<|im_end|>"]


def test_turn_by_turn_rendering_gives_the_same_mask(tiny_tokenizer):
    plain = with_template(tiny_tokenizer, UNMARKED)
    assert encode([{"messages": CHAT}], plain, 512) == encode([{"messages": CHAT}], tiny_tokenizer, 512)


def test_a_template_that_rewrites_earlier_answers(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, REASONING)
    messages = [*CHAT[:2], {"role": "assistant", "content": "<think>1+2</think>three"}, *CHAT[3:]]
    examples = encode([{"messages": messages}], tokenizer, 512)
    runs = [masked_runs(example, tokenizer) for example in examples]
    assert runs == [["<think>1+2</think>three<|im_end|>"], ["<think>\n\n</think>\n\nseven — é<|im_end|>"]]
    last = tokenizer.decode(examples[1].input_ids)
    assert "assistant\nthree<|im_end|>" in last, "history is as the template shows it"


def test_an_end_of_turn_that_is_only_a_line_break_stays_masked(tiny_tokenizer):
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = with_template(tiny_tokenizer, template)
    ((text, spans, count),) = Chat(CHAT, {}, tokenizer).answers()
    assert [text[start:end] for start, end in spans] == ["three\n", "seven — é\n"] and count == len(CHAT)


def test_a_template_that_hides_its_answers_is_refused(tiny_tokenizer):
    template = "{% for m in messages %}{{ loop.length ~ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"row 0: cannot find answer 4 .* \{% generation %\}"):
        encode([{"messages": CHAT}], with_template(tiny_tokenizer, template), 512)


def test_a_template_that_refuses_a_conversation_is_named(tiny_tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="row 0: the tokenizer's chat template refuses .*roles must alternate"):
        encode([{"messages": CHAT}], with_template(tiny_tokenizer, template), 512)


def test_a_tokenizer_without_chat_template_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="chat_template"):
        encode([{"messages": CHAT}], with_template(tiny_tokenizer, None), 512)


def test_texts_are_masked_throughout(tiny_tokenizer):
    text = encode([{"text": "a text"}], tiny_tokenizer, 512)[0]
    assert tiny_tokenizer.decode(text.input_ids) == "a text" and set(text.loss_mask) == {1}


def test_rows_are_cut_at_max_length(tiny_tokenizer):
    whole = encode([{"messages": CHAT}], tiny_tokenizer, 512)[0]
    cut = encode([{"messages": CHAT}], tiny_tokenizer, 40)[0]
    assert cut == Example(whole.input_ids[:40], whole.loss_mask[:40])


@pytest.mark.parametrize("template", ["fixture", UNMARKED])
@pytest.mark.parametrize("messages", [CHAT[:2], CHAT[1:2]])
def test_an_empty_mask_is_a_hard_error(tiny_tokenizer, template, messages):
    tokenizer = tiny_tokenizer if template == "fixture" else with_template(tiny_tokenizer, template)
    rows = [{"messages": CHAT}, {"messages": messages}]
    with pytest.raises(ValueError, match=r"row 1: no answer token .* all zero"):
        encode(rows, tokenizer, 512)
    with pytest.raises(ValueError, match=r"row 1: no answer token .* all zero"):
        encode(rows, tokenizer, 512, drop_long=True)


def test_an_answer_beyond_max_length_stops_or_is_dropped(tiny_tokenizer):
    late = {"messages": [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "ok"}]}
    start = encode([late], tiny_tokenizer, 512)[0].loss_mask.index(1)
    with pytest.raises(
        ValueError, match=rf"row 1: the answer starts at token {start}, beyond max_length=50.*--drop-long"
    ):
        encode([{"messages": CHAT}, late], tiny_tokenizer, 50)
    kept = encode([{"messages": CHAT}, late], tiny_tokenizer, 50, drop_long=True)
    assert kept == encode([{"messages": CHAT}], tiny_tokenizer, 50)
    with pytest.raises(ValueError, match="None of the 1 rows from row 0 on has an answer within max_length=50"):
        encode([late], tiny_tokenizer, 50, drop_long=True)
    assert encode([late], tiny_tokenizer, start + 1)[0].loss_mask[-1] == 1


@pytest.mark.parametrize(
    ("content", "drop_long", "message"),
    [
        ("", False, ":3: no answer token"),
        ("ok", False, ":3: the answer"),
        ("ok", True, ":3 on has an answer within"),
    ],
)
def test_a_row_to_blame_is_named_by_file_and_line(tmp_path, tiny_tokenizer, content, drop_long, message):
    messages = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": content}]
    path = tmp_path / "held-out.jsonl"
    path.write_text("\n\n" + json.dumps({"messages": messages if content else messages[:1]}) + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        encode(load_rows(str(path)), tiny_tokenizer, 50, drop_long)


def test_a_template_that_refuses_a_row_of_a_file_is_named_with_it(tmp_path, tiny_tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    tokenizer = with_template(tiny_tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: the tokenizer's chat template refuses")):
        encode(load_rows(str(path)), tokenizer, 512)


# -- draft vocabulary --------------------------------------------------------------------------------------------------


def test_draft_vocabulary_by_hand():
    # Masked counts: 7 -> 3, 2 -> 2, 5 -> 2, 9 -> 1. Token 1 occurs four times, but never masked.
    examples = [Example([1, 1, 7, 7, 2, 5], [0, 0, 1, 1, 1, 1]), Example([1, 1, 9, 5, 2, 7], [0, 0, 1, 1, 1, 1])]
    d2t, t2d = draft_vocabulary(examples, 2, 10)
    assert (torch.arange(2) + d2t).tolist() == [2, 7], "the lower id wins the tie between 2 and 5"
    assert t2d.nonzero().flatten().tolist() == [2, 7]
    assert d2t.dtype == torch.int64 and d2t.tolist() == [2, 6] and t2d.dtype == torch.bool
    d2t, t2d = draft_vocabulary(examples, 6, 10)
    assert (torch.arange(6) + d2t).tolist() == [0, 1, 2, 5, 7, 9], "unused places go to the lowest ids"
    d2t, t2d = draft_vocabulary(examples, 10, 10)
    assert d2t.tolist() == [0] * 10 and bool(t2d.all())


def test_draft_vocabulary_is_accepted_by_the_drafter():
    from ppow import PPOWConfig, PPOWDrafter

    config = PPOWConfig(
        vocab_size=10,
        draft_vocab_size=2,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        target_num_layers=4,
    )
    drafter = PPOWDrafter(config)
    drafter.set_draft_vocabulary(*draft_vocabulary([Example([3, 3, 8], [1, 1, 1])], 2, 10))
    assert drafter.draft_columns().tolist() == [3, 8]


@pytest.mark.parametrize(
    ("size", "ids", "message"),
    [
        (0, [1], "draft_vocab_size=0 must lie in 1..10"),
        (11, [1], "draft_vocab_size=11 must lie in 1..10"),
        (2, [10], "Token id 10 lies outside the target's vocabulary of 10"),
    ],
)
def test_bad_draft_vocabularies_are_refused(size, ids, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draft_vocabulary([Example(ids, [1] * len(ids))], size, 10)


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(12, 4), (7, 3), (3, 8)])
def test_every_epoch_visits_every_example_once(n, batch):
    stream = [index for step in range(n) for index in batch_indices(n, batch, seed=5, step=step)]
    assert len(stream) == n * batch
    for epoch in range(batch):
        assert collections.Counter(stream[epoch * n : (epoch + 1) * n]) == collections.Counter(range(n))


def test_batches_depend_on_seed_and_step_alone():
    first = [batch_indices(50, 8, seed=1, step=step) for step in range(20)]
    batch_indices(50, 8, seed=2, step=3)
    assert batch_indices(50, 8, seed=1, step=13) == first[13]
    assert first != [batch_indices(50, 8, seed=2, step=step) for step in range(20)]
    assert sorted(sum(first[:6], [])) != sum(first[:6], []), "shuffled"


def test_the_order_is_the_same_on_every_machine():
    assert batch_indices(6, 6, seed=0, step=0) == [0, 5, 1, 4, 3, 2]


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, -1)])
def test_bad_batches_are_refused(arguments):
    with pytest.raises(ValueError, match="must be >= 1"):
        batch_indices(*arguments)


def test_a_batch_is_padded_to_the_right():
    batch = make_batch([Example([5, 6, 7], [0, 1, 1]), Example([8], [1])], pad_id=0, device="cpu", seed=3)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True], [True, False, False]]
    assert batch.lengths.tolist() == [3, 1]
    assert batch.input_ids.dtype == torch.int64 and batch.loss_mask.dtype == torch.bool
    with pytest.raises(ValueError, match="empty batch"):
        make_batch([], pad_id=0, device="cpu", seed=3)
