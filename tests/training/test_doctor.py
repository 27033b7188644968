"""`ppow doctor`: a healthy pair, drafters damaged on purpose in every way that it knows, and its figures by hand."""

import copy
import json
import shlex
import shutil

import pytest
import torch
from huggingface_hub import constants
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.diagnoses import DAMAGES
from gguf_target import write_gguf
from hub.clients import push
from ppow import PPOWConfig, PPOWDrafter
from ppow.drafting_ppow import DrafterState, call_config
from ppow.training import cli, config, doctor
from ppow.training.acceptance import reach, walk
from ppow.training.config import DoctorConfig
from ppow.training.symptoms import Case, better, length, misnamed
from ppow.training.target import FrozenTarget
from ppow.training.unrolled import Unrolled
from small_pair import PAIR

pytest_plugins = ["hub.fixtures"]

QUESTIONS = [
    "Tom has 12 apples. He buys 8 more apples and gives 5 apples to his sister. How many apples does Tom have left?",
    "A baker sells 24 cakes in the morning and 18 cakes in the afternoon. Each cake costs $3. How much does he make?",
    "Maria reads 15 pages every day. How many pages does she read in two weeks?",
    "I want to book a table at a restaurant.",
    "There are 30 students in a class. 40% of them are boys. How many girls are there in the class?",
    "A book has 120 pages. Anna reads 15 pages a day. How many days does she need?",
]
SHORT = {"max_new_tokens": 24, "window_size": 4}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    return file


@pytest.fixture
def examine(questions, monkeypatch, tmp_path):
    """Runs the command on a drafter, in an empty folder: -> its report."""
    monkeypatch.chdir(tmp_path)

    def run(drafter, target=PAIR / "target", **options):
        if isinstance(drafter, PPOWDrafter):
            drafter.save_pretrained("damaged")
            drafter = "damaged"
        options = {"data": [str(questions)], "limit": 4, **SHORT, **options}
        return doctor.main(DoctorConfig(target=str(target), drafter=str(drafter), **options))

    return run


@pytest.fixture
def drafter():
    return PPOWDrafter.from_pretrained(PAIR / "drafter", dtype=torch.float32)


@pytest.fixture(scope="module")
def target():
    return AutoModelForCausalLM.from_pretrained(PAIR / "target", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PAIR / "target")


def chat_ids(tokenizer, question):
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def greedy(target, ids, count):
    out = target.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count)
    return out[0, len(ids) :].tolist()


def first_fault(report):
    return report["findings"][0]["fault"] if report["findings"] else "nothing"


def fixed(report):
    """What the first finding's command makes of the drafter."""
    python, _, again = report["next"].partition(" && ")
    command = shlex.split(python)
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})
    place = shlex.split(again)[-1]
    assert shlex.split(again)[:2] == ["ppow", "doctor"]
    return PPOWDrafter.from_pretrained(place, dtype=torch.float32)


# -- a healthy pair ----------------------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_a_healthy_pair(examine, drafter, target, tokenizer, tmp_path, capsys):
    report = examine(PAIR / "drafter", output="doctor.json")
    page = capsys.readouterr().out
    assert report["findings"] == [] and "Nothing is wrong.\nNext: ppow evaluate " in page
    assert report["records"]["the target's weights"] == "those that it records"
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert written["figures"] == report["figures"] and written["command"] == "doctor"

    answers = [greedy(target, chat_ids(tokenizer, question), 24) for question in QUESTIONS[:4]]
    behind_the_first = [answer[1:] for answer in answers]
    known = set(drafter.draft_columns().tolist())
    inside = [[token in known for token in answer] for answer in behind_the_first]
    flags, lengths = sum(inside, []), []
    for row in inside:
        for place in range(len(row)):
            window = row[place : place + 4]
            lengths.append(1 + (window.index(False) if False in window else len(window)))
    held = report["figures"]["draft vocabulary"]
    assert held["coverage"] == pytest.approx(sum(flags) / len(flags))
    assert held["ceiling"] == pytest.approx(sum(lengths) / len(lengths))
    assert held["length"] < held["ceiling"]

    decoded = report["figures"]["decoding"]
    assert decoded["parts"] == [] and decoded["generate"] == decoded["along the text"]
    gained, verifications, plain = 0, 0, target.generation_config
    for question in QUESTIONS[:4]:
        settings = {"max_new_tokens": 24, "window_size": 4, "draft_threshold": 0.0, "return_dict_in_generate": True}
        options = {"generation_config": call_config(plain, do_sample=False, **settings), "assistant_model": drafter}
        out = target.generate(torch.tensor([chat_ids(tokenizer, question)]), **options)
        gained, verifications = gained + sum(out.acceptance.gained[0]), verifications + out.acceptance.verifications
    assert decoded["generate"]["length"] == pytest.approx(gained / verifications) and gained / verifications > 2.5
    ways = report["figures"]["ways"]
    assert {"taps one layer earlier", "norm_output True", "bfloat16", "without the chat template"} < set(ways)
    assert max(ways[name]["length"] for name in ways if name.startswith(("taps", "norm"))) < ways["as given"]["length"]
    assert report["figures"]["far"]["limit"] == 128  # max_length in its provenance.json


# -- damaged ones ------------------------------------------------------------------------------------------------------


def damage(drafter, name):
    """-> the drafter with this fault of benchmarks/diagnoses.py, and what doctor is to say first."""
    fault = DAMAGES[name].fault.format(config=drafter.config)
    return DAMAGES[name].change(drafter) or drafter, fault


def test_taps_of_another_layer(examine, drafter):
    drafter, fault = damage(drafter, "taps one layer too early")
    report = examine(drafter, limit=6, max_new_tokens=64, window_size=10)
    assert first_fault(report) == fault == "taps one layer later"
    assert fixed(report).config.target_taps == PPOWConfig.from_pretrained(PAIR / "drafter").target_taps


def test_a_switch_the_other_way(examine, drafter):
    drafter, fault = damage(drafter, "`norm_output` switched")
    report = examine(drafter)
    assert (
        first_fault(report) == fault == "norm_output False"
        and report["figures"]["ways"]["norm_output False"]["length"] > 2.5
    )
    assert fixed(report).config.norm_output is False


def test_a_permuted_draft_vocabulary(examine, drafter):
    right = drafter.d2t.clone()
    drafter, fault = damage(drafter, "d2t permuted")
    report = examine(drafter, window_size=2)
    assert first_fault(report) == fault == "draft vocabulary in order" and len(report["findings"]) == 1
    assert torch.equal(fixed(report).d2t, right)


@pytest.mark.parametrize("name", ["absolute ids in d2t", "d2t rounded to bfloat16"])
def test_absolute_ids_and_rounded_offsets_need_no_forward_pass(examine, drafter, name):
    right = drafter.d2t.clone()
    drafter, fault = damage(drafter, name)
    report = examine(drafter)
    assert first_fault(report) == fault == "draft vocabulary" and report["figures"] == {}
    assert torch.equal(fixed(report).d2t, right)


def test_the_draft_vocabulary_of_another_run(examine, drafter):
    """Like the right one in everything that can be read off it; half of the answers' tokens are in it."""
    drafter, fault = damage(drafter, "d2t and t2d of another run")
    report = examine(drafter, limit=3, max_new_tokens=16)
    assert first_fault(report) == fault == "draft vocabulary of another run"
    assert shlex.split(report["next"])[:2] == ["ppow", "import"]


def test_a_draft_vocabulary_of_rare_tokens(examine, drafter, target, tokenizer):
    small, fault = damage(drafter, "the commonest tokens left out")
    report = examine(small)
    assert first_fault(report) == fault == "coverage of the draft vocabulary" and len(report["findings"]) == 1
    answers = [greedy(target, chat_ids(tokenizer, question), 24)[1:] for question in QUESTIONS[:4]]
    rare = sum(bool(small.t2d[token]) for answer in answers for token in answer) / sum(map(len, answers))
    assert report["figures"]["draft vocabulary"]["coverage"] == pytest.approx(rare) and rare < 0.4
    assert "--draft-vocab-size 3512" in report["next"] and "--drafter" not in report["next"]


def test_weights_that_bfloat16_does_not_hold(examine, drafter):
    drafter, fault = damage(drafter, "logits too large for bfloat16")
    report = examine(drafter)
    assert first_fault(report) == fault == "bfloat16" and report["figures"]["ways"]["as given"]["length"] > 2.5


def test_records_that_are_wrong(examine, drafter):
    """Neither costs a draft in plain transformers, and both are found without a forward pass."""
    damage(damage(drafter, "512 positions")[0], "another end-of-text token")
    report = examine(drafter)
    assert sorted(finding["fault"] for finding in report["findings"]) == ["positions", "special tokens"]
    assert "eos_token_id 0 instead of 2" in str(report["findings"]) and "512 positions, the target 2048" in str(report)
    commands = {finding["fault"]: finding["next"] for finding in report["findings"]}
    assert fixed({"next": commands["positions"]}).config.max_position_embeddings == 2048
    assert fixed({"next": commands["special tokens"]}).config.eos_token_id == 2


def test_long_texts_that_spoil_what_a_drafter_sees(examine, drafter, monkeypatch):
    """Behind 64 tokens nothing reaches it; only the long text has so many."""
    fuse = PPOWDrafter.fuse
    near = torch.arange(4096)[:, None] < 64
    monkeypatch.setattr(PPOWDrafter, "fuse", lambda self, taps: fuse(self, taps) * near[: taps.shape[1]])
    drafter.config.max_position_embeddings = 64
    report = examine(drafter)
    far = report["figures"]["far"]
    assert far["limit"] == 64 and far["first_draft"] < 0.5 < far["first_draft_alone"]
    assert first_fault(report) == "long texts" and "--max-length" in report["next"]


def test_a_drafter_that_has_unlearned_the_chat_template(examine, drafter, target, tokenizer):
    texts = []
    for question in QUESTIONS[:4]:
        ids = chat_ids(tokenizer, question)
        answer = greedy(target, ids, 24)
        texts.append((-1, ids, answer))
        bare = tokenizer(f"{question}\n{tokenizer.decode(answer[:8])}")["input_ids"]
        texts.append((1, bare, greedy(target, bare, 24)))
    frozen = FrozenTarget(target, drafter.config.target_taps)
    batches = [(sign, len(ids), torch.tensor([ids + answer])) for sign, ids, answer in texts if len(answer) > 1]
    read = [frozen.read(batch).taps for _, _, batch in batches]
    columns = torch.full((4096,), -1).index_copy_(0, drafter.draft_columns(), torch.arange(2048))
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-3)
    for _ in range(10):
        loss = 0.0
        for (sign, prompt, batch), taps in zip(batches, read):
            features = Unrolled(drafter, drafter.embed_tokens, batch, taps).features[0, prompt - 1 : -1]
            labels = columns[batch[0, prompt + 1 :]]
            chances = drafter.logits(features).softmax(-1).gather(1, labels.clamp(min=0)[:, None])[labels >= 0]
            loss = loss - sign * chances.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = examine(drafter)
    assert first_fault(report) == "chat template" and "ppow regenerate" in report["next"]


def test_decoding_that_feeds_something_else_than_training(examine, monkeypatch):
    chain = DrafterState.chain

    def deaf(state, *args, **kwargs):
        embed, state.embed = state.embed, lambda tokens: 0 * embed(tokens)  # a draft does not hear the one before it
        try:
            return chain(state, *args, **kwargs)
        finally:
            state.embed = embed

    monkeypatch.setattr(DrafterState, "chain", deaf)
    report = examine(PAIR / "drafter")
    assert first_fault(report) == "decoding" and "part from draft 2 on" in report["findings"][0]["words"]
    decoded = report["figures"]["decoding"]
    part = decoded["parts"][0]
    assert part["generate"] < part["along_the_text"] and decoded["generate"]["length"] < 2.5


def test_a_target_of_the_same_shapes(examine, target, tmp_path):
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_pretrained(PAIR / "target", dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.8 * parameter.std() * torch.randn_like(parameter)
    other.save_pretrained("other")
    AutoTokenizer.from_pretrained(PAIR / "target").save_pretrained("other")
    report = examine(PAIR / "drafter", "other", limit=3, window_size=2)
    assert first_fault(report) == "another target" and "other weights" in report["findings"][0]["words"]
    assert report["records"]["the target's weights"] == "others than it records"
    shutil.copytree(PAIR / "drafter", "silent", ignore=shutil.ignore_patterns("metrics.json", "provenance.json"))
    report = examine("silent", "other", limit=2, window_size=2)
    assert first_fault(report) == "low acceptance" and report["records"]["the target's weights"] == "not recorded"


def test_a_target_of_other_shapes_is_told_before_anything_is_loaded(examine, save_target, monkeypatch, tmp_path):
    save_target(tmp_path / "tiny")
    monkeypatch.setattr(doctor, "load_model", None)
    report = examine(PAIR / "drafter", "tiny")
    assert first_fault(report) == "another target" and report["figures"] == {}
    assert "hidden size 160 in the drafter, 32 in the target" in report["records"]["shapes"]
    assert report["next"] == "ppow train --target tiny --output-dir run"


# -- where the models may come from ------------------------------------------------------------------------------------


def test_a_gguf_target_and_a_drafter_that_knows_nothing(examine, save_target, tiny_config, tiny_tokenizer, tmp_path):
    write_gguf(tmp_path / "target.gguf", save_target(tmp_path / "target"), tiny_tokenizer)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "metrics.json").write_text(json.dumps({"weights": {"target": "0" * 64}}))  # safetensors
    report = examine(PPOWDrafter(PPOWConfig.from_target(tiny_config)), "target.gguf")
    assert report["records"]["the target's weights"].startswith("not comparable")
    assert first_fault(report) == "low acceptance" and report["figures"]["first_draft"] < 0.1


def test_a_drafter_of_another_trainer(examine):
    command = ["export", str(PAIR / "drafter"), "--format=vllm", f"--target={PAIR / 'target'}", "--out=exported"]
    assert cli.main(command) == 0
    report = examine("exported")
    assert first_fault(report) == "nothing" and report["figures"]["first_draft"] > 0.6


def test_a_pair_of_the_hub_and_a_drafter_that_records_another_target(hub, pair, examine, monkeypatch):
    AutoModelForCausalLM.from_pretrained(pair / "target").push_to_hub("alice/target")
    AutoTokenizer.from_pretrained(pair / "target").push_to_hub("alice/target")
    assert push(pair, "alice/drafter", "--target", "alice/target") == 0
    found = examine("alice/drafter", "alice/target", limit=6)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = examine("alice/drafter", "alice/target", limit=6)
    assert found["records"] == again["records"] and found["figures"] == again["figures"]
    assert "name of the target" not in [finding["fault"] for finding in found["findings"]]
    other = PPOWDrafter.from_pretrained("alice/drafter")
    other.config.target_name_or_path = "alice/other"
    report = examine(other, "alice/target", limit=6)
    named = next(finding for finding in report["findings"] if finding["fault"] == "name of the target")
    assert "records alice/other" in named["words"] and report["figures"]["ways"] == found["figures"]["ways"]
    assert fixed(named).config.target_name_or_path == "alice/target"


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_every_command_that_it_names_is_one(examine, questions):
    """Read back by the commands' own configurations."""
    options = DoctorConfig(target="t", drafter="d/e")
    found = [doctor.trained(options), doctor.trained(options, "--max-length", "9"), doctor.imported_again(options)]
    found += [doctor.command(options, "evaluate", "--no-cuda-graphs", "--output-dir", "x")]
    found += [doctor.trained(options, "--draft-vocab-size", "7", fresh=True), doctor.fixed(options, "pass")]
    commands = [part for line in found for part in line.split(" && ") if part.startswith("ppow ")]
    assert len(commands) == 9
    for program, name, *arguments in map(shlex.split, commands):
        assert program == "ppow"
        getattr(config, cli.COMMANDS[name].config).from_args(arguments)


def test_windows_along_a_text_by_hand():
    stands = [torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    found = walk(stands, 2)
    assert found.gained == [[3, 1, 1], [1]] and found.accepted == [[2, 0, 1], [0]] and found.drafted[0] == [2, 2, 2]
    # six tokens may be written: the window at 4 has no room for a draft beside the bonus
    assert walk(stands[:1], 2, 6).drafted == [[2, 1, 0]] and walk(stands[:1], 2, 6).accepted == [[2, 0, 0]]
    assert reach(stands[0]).tolist() == [3, 1, 2, 1, 2] and length(stands) == pytest.approx(10 / 6)


def test_better_is_more_and_sure():
    given = [torch.full((4, 1), 0.50) for _ in range(4)]
    assert better([torch.full((4, 1), share) for share in (0.60, 0.62, 0.58, 0.60)], given)
    assert not better([torch.full((4, 1), share) for share in (0.52, 0.51, 0.52, 0.53)], given)  # sure, but no more
    assert not better([torch.full((4, 1), share) for share in (1.00, 0.20, 1.00, 0.20)], given)  # more, but not sure
    assert not better([torch.full((4, 1), 1.0)], given[:1])  # one prompt tells nothing


def test_better_is_read_off_stretches_of_the_texts():
    given = [torch.full((8, 1), 0.5) for _ in range(4)]
    # one text gains most: over the four texts its gain is as large as the error that it brings
    assert better([torch.full((8, 1), share) for share in (0.9, 0.52, 0.51, 0.5)], given)
    # two texts alike, in which windows gain as often as they lose
    waves = torch.tensor([1.0, 1.0, 0.1, 0.1, 0.9, 0.9, 0.3, 0.3])[:, None]
    assert length([waves]) > 1.02 * length(given[:1]) and not better([waves, waves], given[:2])


def test_misnamed_drafts_by_hand():
    known = torch.ones(10, dtype=torch.bool).index_fill_(0, torch.tensor([8]), False)
    # 1 means 5, also in the other text; 2 means itself, and is once wrong; 3 meets 6 here and 7 there; 4 is here alone
    here, there = [(1, 5), (1, 5), (2, 2), (3, 6), (4, 9), (4, 9)], [(1, 5), (2, 9), (3, 7), (3, 3)]
    assert misnamed([here, there], known) == (3, 6)  # 1 three times; 2 once, 3 twice
    assert misnamed([here + [(1, 1)], there], known) == (0, 6)  # a name that is right once is right
    assert misnamed([[(1, 8), (1, 8)], [(1, 8)]], known) == (0, 0)  # what cannot be drafted says nothing about names
    assert misnamed([here + there], known) == (0, 0)  # one text tells nothing


@torch.no_grad()
def test_answers_together_are_those_with_drafts_and_a_text_is_read_once(drafter, target, tokenizer, monkeypatch):
    prompts = [(chat_ids(tokenizer, question), question) for question in QUESTIONS]
    prompts.insert(1, ([], "no token, so no answer"))
    options = DoctorConfig(target="t", drafter="d", max_new_tokens=12)
    case = Case(options, FrozenTarget(target, []), tokenizer, drafter, 4, tqdm(disable=True))
    texts, plain = case.answers(prompts, "some", 2), case.answers(prompts, "none", 0)
    assert [text.ids for text in texts] == [text.ids for text in plain] and len(texts) == len(QUESTIONS)
    assert [text.windows is None for text in texts] == [False, False, True, True, True, True]
    assert all(text.answer == greedy(target, text.ids[: text.prompt], 12)[1:] for text in plain)

    shifted = copy.deepcopy(drafter)
    shifted.config.target_taps = [tap - 1 for tap in drafter.config.target_taps]
    alone = [case.along(texts, [one], "alone")[0] for one in (drafter, shifted)]
    read, reads = FrozenTarget.read, []
    monkeypatch.setattr(FrozenTarget, "read", lambda self, ids: reads.append(len(ids)) or read(self, ids))
    together = case.along(texts, [drafter, shifted], "together")
    assert reads == [4, 2]
    for ours, theirs in zip(sum(together, []), sum(alone, [])):
        assert torch.equal(ours.stands, theirs.stands) and torch.equal(ours.drafts, theirs.drafts)
        torch.testing.assert_close(ours.chances, theirs.chances)
    assert not torch.equal(together[0][0].chances, together[1][0].chances)


def test_what_an_examination_costs(examine, monkeypatch):
    """Target forwards, so that no way to put the pair together is paid for twice."""
    generate, read, calls = LlamaForCausalLM.generate, FrozenTarget.read, []

    def generating(self, *ids, **options):
        drafts = "drafted" if "assistant_model" in options else "plain"
        calls.append(f"{drafts} {len(ids[0] if ids else options['input_ids'])}")
        return generate(self, *ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generating)
    monkeypatch.setattr(FrozenTarget, "read", lambda self, ids: calls.append(f"read {len(ids)}") or read(self, ids))
    examine(PAIR / "drafter", limit=6, max_new_tokens=12)
    texts = ["read 4", "read 2"]
    assert calls == ["drafted 1"] * 4 + ["plain 2", *texts, "read 1", "plain 6", *texts, *texts]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (1, {}, "1 of 1 prompts fit .* two such prompts are needed. Bring others with --data"),
        (2, {"output": "."}, "--output . is a folder; name a .json file in it"),
        (2, {"drafter": "nowhere/at/all"}, "--drafter nowhere/at/all is no folder here"),
    ],
)
def test_what_cannot_be_examined(examine, tmp_path, rows, options, message):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS[:rows]))
    options = {"drafter": PAIR / "drafter", "data": ["rows.jsonl"], **options}
    with pytest.raises(ValueError, match=message):
        examine(**options)
