"""What the target would write in a conversation: chat templates of many kinds, rendered and masked."""

import json

import pytest

from chat_helpers import masked_runs, with_template
from ppow.training.chats import Chat
from ppow.training.data import BadRows, encode, fingerprint
from ppow.training.rows import normal
from ppow.training.sources import BadRow

END = "<|im_end|>"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
# DeepSeek-R1: the generation prompt opens a thought, and no answer in the conversation shows its own.
R1 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant:' + m['content'].split('</think>')[-1] + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:<think>\n' }}{% endif %}"
)
# Qwen3 of 2507, the thinking ones: as R1's, but the turn after the last question shows its thought, even an empty one.
QWEN = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set body = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in body %}{% set thought = body.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set body = body.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ body + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# Qwen3 of 2505: the model opens its thoughts itself, or finds an empty one.
SWITCH = (
    "{% for m in messages %}"
    + TURN
    + "{% endfor %}"
    + ASK
    + "{% if add_generation_prompt and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + (c.function.arguments | tojson) }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
PARTS = (  # Llava: it reads parts, and of a text nothing
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
LAST_END = (  # the end of the text, not of a turn, is marked
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% else %}{{ '<|im_end|>' }}{% endif %}"
)
MARKED = (  # with generation blocks, around an opened thought
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ '<think>\n\n</think>\n\n' + m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


def say(*texts, **more):
    """A chat of a user and an assistant in turns; ``more`` belongs to the last message."""
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    chat[-1].update(more)
    return chat


def runs(tokenizer, template, messages, **row):
    """What is to be learned, example by example."""
    tokenizer = with_template(tokenizer, template) if template else tokenizer
    examples = encode([normal({"messages": messages, **row})], tokenizer, 4096)
    return [masked_runs(example, tokenizer) for example in examples]


THOUGHT = "<think>\nWell.\n</think>\n\n"
CUT = {"complete": False, "by": {}}


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        # a thought that the prompt opens, and the template drops
        (R1, say("a", "one"), [[f"one{END}"]]),
        (R1, say("a", "<b>"), [[f"<b>{END}"]]),
        (R1, say("a", f"{THOUGHT}one"), [[f"Well.\n</think>\n\none{END}"]]),
        (R1, say("a", "Well.\n</think>\n\none"), [[f"Well.\n</think>\n\none{END}"]]),
        (R1, say("a", "one", reasoning_content="Well."), [[f"Well.\n</think>\n\none{END}"]]),
        (R1, say("a", "one", "b", "two"), [[f"one{END}", f"two{END}"]]),
        (
            R1,
            say("a", f"{THOUGHT}one", "b", f"{THOUGHT}two"),
            [[f"Well.\n</think>\n\n{x}{END}"] for x in ("one", "two")],
        ),
        (R1, say("a", "one", "b", f"{THOUGHT}two"), [[f"one{END}", f"Well.\n</think>\n\ntwo{END}"]]),
        # ... and shows in the last turn
        (QWEN, say("a", "one"), [[f"\n</think>\n\none{END}"]]),
        (QWEN, say("a", f"{THOUGHT}one"), [[f"Well.\n</think>\n\none{END}"]]),
        (QWEN, say("a", "one", reasoning_content="Well."), [[f"Well.\n</think>\n\none{END}"]]),
        (
            QWEN,
            say("a", f"{THOUGHT}one", "b", f"{THOUGHT}two"),
            [[f"Well.\n</think>\n\n{x}{END}"] for x in ("one", "two")],
        ),
        (QWEN, [*say("a", f"{THOUGHT}one"), {"role": "user", "content": "b"}], [[f"Well.\n</think>\n\none{END}"]]),
        (
            QWEN,
            [*say("a", f"{THOUGHT}one"), {"role": "tool", "content": "r"}, *say("", f"{THOUGHT}two")[1:]],
            [[f"Well.\n</think>\n\none{END}", f"Well.\n</think>\n\ntwo{END}"]],
        ),
        # thoughts of no concern
        (PLAIN, say("a", f"{THOUGHT}one"), [[f"{THOUGHT}one{END}"]]),
        (PLAIN, say("a", "one", reasoning_content="Well."), [[f"one{END}"]]),
        (SWITCH, say("a", "one", reasoning_content="Well."), [[f"{THOUGHT}one{END}"]]),
        (SWITCH, say("a", f"{THOUGHT}one", "b", "two"), [[f"{THOUGHT}one{END}", f"two{END}"]]),
        # blocks of the template, and what the prompt wrote of them
        (MARKED, say("a", "one", "b", "two"), [[f"\n</think>\n\none{END}", f"\n</think>\n\ntwo{END}"]]),
        # other templates
        (LAST_END, say("a", "one", "b", "two"), [[f" one\n{END}"], [f" two\n{END}"]]),
        (PARTS, say("a", "one", "b", "two"), [[f"one{END}", f"two{END}"]]),
        # who asked, and what is not to be learned
        (PLAIN, say("a", "one", "b", "two")[1:], [[f"two{END}"]]),
        (PLAIN, [{"role": "developer", "content": "Be."}, *say("a", "one")], [[f"one{END}"]]),
        (PLAIN, [*say("a", "one", weight=0), *say("b", "two", weight=1)], [[f"two{END}"]]),
        (None, [*say("a", "one", weight=0), *say("b", "two")], [[f"two{END}"]]),
        (None, [*say("a", "one"), {"role": "user", "content": "b"}], [[f"one{END}"]]),
        (HERMES, say("a", None, tool_calls=[CALL]), [[f'<tool_call>clock{{"zone": "UTC"}}{END}']]),
    ],
)
def test_what_the_target_would_write_is_learned(tiny_tokenizer, template, chat, expected):
    assert runs(tiny_tokenizer, template, chat) == expected


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        (PLAIN, say("a", "one", "b", "two"), [[f"one{END}", "two"]]),
        (None, say("a", "one", "b", "two"), [[f"one{END}", "two"]]),
        (R1, say("a", "<think>\nWell"), [["Well"]]),
        (R1, say("a", "Well"), [["Well"]]),
        (R1, say("a", f"{THOUGHT}on"), [["Well.\n</think>\n\non"]]),
        (R1, say("a", "", reasoning_content="Well"), [["Well"]]),
        (QWEN, say("a", "<think>\nWell"), [["Well"]]),
        (QWEN, say("a", "", reasoning_content="Well"), [["Well"]]),
        (QWEN, say("a", f"{THOUGHT}on"), [["Well.\n</think>\n\non"]]),
    ],
)
def test_the_end_of_an_answer_that_was_cut_short_is_not_the_targets(tiny_tokenizer, template, chat, expected):
    assert runs(tiny_tokenizer, template, chat, **CUT) == expected


@pytest.mark.parametrize("template", [PLAIN, R1, QWEN, SWITCH, HERMES, PARTS])
def test_an_answer_follows_the_prompt_that_decoding_would_give(tiny_tokenizer, template):
    """The tokens before the first masked one are those of the rendered prompt, thought's opening and all."""
    tokenizer = with_template(tiny_tokenizer, template)
    chat = say("What is a fox?", f"{THOUGHT}A fox.", "And a dog?", f"{THOUGHT}A dog.")
    for example, count in zip(encode([{"messages": chat}], tokenizer, 512)[::-1], (3, 1)):
        prompt = Chat(chat[:count], {}, tokenizer).render(prompt=True)
        last = len(example.loss_mask) - 1 - example.loss_mask[::-1].index(1)
        start = last - example.loss_mask[last::-1].index(0) + 1 if 0 in example.loss_mask[:last] else 0
        assert tokenizer.decode(example.input_ids[:start]) == prompt


def test_tools_and_options_shape_the_prompt(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, HERMES)
    tool = {"type": "function", "function": {"name": "clock"}}
    (example,) = encode([{"messages": say("a", "one"), "tools": [tool]}], tokenizer, 512)
    assert tokenizer.decode(example.input_ids).startswith(f"<|im_start|>system\n{json.dumps(tool)}{END}")
    tokenizer = with_template(tiny_tokenizer, "{{ date }}{{ documents[0].text }}" + PLAIN)
    row = normal({"messages": say("a", "one"), "documents": [{"text": "D"}], "chat_template_kwargs": {"date": "today"}})
    assert tokenizer.decode(encode([row], tokenizer, 512)[0].input_ids).startswith("todayD<|im_start|>user")
    tokenizer = with_template(tiny_tokenizer, SWITCH)
    prompt = Chat(say("a"), {"enable_thinking": False}, tokenizer).render(prompt=True)
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("needs", ["{{ m.content }}", "{{ m['content'] + '' }}", "{{ m.content | trim }}"])
def test_content_that_is_none_is_written_as_nothing(tiny_tokenizer, needs):
    call = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    template = "{% for m in messages %}{{ m.role + ': ' }}" + needs + call + "{{ '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    chat = [*say("a", None, tool_calls=[CALL]), {"role": "tool", "content": "noon"}, *say("", "one")[1:]]
    assert runs(tiny_tokenizer, template, chat) == [[f"clock{END}", f"one{END}"]]


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        (PLAIN, say("a", None, tool_calls=[CALL]), "does not write the call of 'clock'"),
        (None, say("a", None, tool_calls=[CALL]), "does not write the call of 'clock'"),
        (PLAIN, say("a"), "no answer token"),
        (PLAIN, say("a", "one")[1:], "no answer token"),
        ("{{ raise_exception('no') }}", say("a", "one"), "refuses this conversation (no)"),
        ("{{ messages[0].content | nofilter }}", say("a", "one"), "refuses this conversation"),
        ("{{ messages[0].content + 1 }}", say("a", "one"), "refuses this conversation"),
        ("{% for m in messages %}{{ loop.length ~ m.content }}{% endfor %}", say("a", "one"), "cannot find answer 1"),
    ],
)
def test_a_row_that_teaches_nothing_is_skipped_and_named(tiny_tokenizer, template, chat, reason):
    tokenizer = with_template(tiny_tokenizer, template) if template else tiny_tokenizer
    bad, rows = BadRows(skip=True), [normal({"messages": chat}), {"text": "good"}]
    assert len(encode(rows, tokenizer, 512, bad=bad)) == 1
    ((place, told),) = bad.found
    assert place == "row 0" and reason in told
    with pytest.raises(ValueError, match="row 0: .*--skip-bad-rows"):
        encode(rows, tokenizer, 512)


def test_rows_beyond_the_targets_positions_are_bad_and_others_are_cut(tiny_tokenizer):
    late, long = {"messages": say("word " * 60, "ok")}, {"messages": say("a", "word " * 60)}
    bad = BadRows(skip=True)
    (example,) = encode([late, long], tiny_tokenizer, 512, bad=bad, positions=40)
    assert len(example.input_ids) == 40
    assert "but the target has only 40 positions" in bad.found[0][1]
    with pytest.raises(ValueError, match="row 0: .*only 40 positions"):
        encode([late, long], tiny_tokenizer, 512, drop_long=True, positions=40)


def test_rows_that_regenerate_left_unanswered_are_counted(tiny_tokenizer, capsys):
    none = {"messages": say("a"), "complete": False, "by": {}, "error": "refused"}
    empty = {"messages": say("a", ""), "complete": False, "by": {}, "finish": "abort"}
    bad = BadRows()
    assert len(encode([none, {"messages": say("a", "one")}, empty], tiny_tokenizer, 512, bad=bad)) == 1
    bad.report("answers.jsonl")
    assert "answers.jsonl: 2 rows left out: `ppow regenerate` got no answer for them" in capsys.readouterr().err


def test_a_chat_that_no_prompt_can_be_made_of_is_refused(tiny_tokenizer):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + PLAIN
    tokenizer = with_template(tiny_tokenizer, strict)
    with pytest.raises(BadRow, match="user first"):
        Chat([{"role": "system", "content": "a"}], {}, tokenizer)


def test_a_fingerprint_is_of_the_tokens_and_their_mask(tiny_tokenizer):
    one = encode([{"text": "one two"}, {"text": "three"}], tiny_tokenizer, 512)
    assert fingerprint(one) == fingerprint([*one])
    others = [one[::-1], one[:1], [one[0], one[1]._replace(loss_mask=[0] * len(one[1].loss_mask))], []]
    others.append([one[0]._replace(input_ids=one[0].input_ids[:1], loss_mask=[1]), one[1]])
    assert len({fingerprint(examples) for examples in [one, *others]}) == 6
