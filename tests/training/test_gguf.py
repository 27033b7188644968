"""Targets given as a GGUF file: the same model, in every command that reads a target."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gguf_target import write_gguf
from ppow import PPOWDrafter
from ppow.training import cli, loading
from ppow.training.fingerprints import fingerprint


@pytest.fixture(scope="module")
def home(tmp_path_factory, save_target, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("gguf")
    target = save_target(folder / "target")
    write_gguf(folder / "target.gguf", target, tiny_tokenizer)
    prompts = [{"messages": [{"role": "user", "content": f"Add {i} and {i + 1}, one and two."}]} for i in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


def test_the_file_holds_the_same_target(home):
    place = loading.place_of(home / "target.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).state_dict()
    expected = LlamaForCausalLM.from_pretrained(home / "target").state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    tokenizers = [loading.load_tokenizer(home / name) for name in ("target.gguf", "target")]
    text = "A target verifies what the drafter has drafted. äß 12"
    chat = [{"role": "user", "content": text}]
    one, two = ([t(text).input_ids, t.apply_chat_template(chat, add_generation_prompt=True)] for t in tokenizers)
    assert str(one) == str(two) and tokenizers[0].pad_token is not None


def test_every_command_takes_it(home, tmp_path, capsys):
    """The walk from prompts to figures, the same as with the folder, but for the target's name."""
    found = {}
    for name in ("target", "target.gguf"):
        out, target = tmp_path / name, str(home / name)
        common = [
            f"--target={target}",
            f"--data={out / 'answers.jsonl'}",
            "--steps=2",
            "--max-length=64",
            "--drop-long",
        ]
        regenerate = ["regenerate", f"--target={target}", f"--data={home / 'prompts.jsonl'}", "--max-new-tokens=24"]
        out.mkdir()
        walk = [
            [*regenerate, f"--output={out / 'answers.jsonl'}"],
            ["supervised", *common, f"--output-dir={out / 'stage1'}", "--ttt-steps=3", "--draft-vocab-size=200"],
            ["reinforce", *common, f"--drafter={out / 'stage1'}", f"--output-dir={out / 'stage2'}", "--window-size=3"],
            ["reinforce", *common, f"--drafter={out / 'stage1'}", f"--output-dir={out / 'plan'}", "--plan=h100"],
            ["evaluate", f"--target={target}", f"--drafter={out / 'stage2'}", f"--output-dir={out / 'figures'}"]
            + [f"--prompts={home / 'prompts.jsonl'}", "--limit=2", "--temperatures=0", "--max-new-tokens=12"],
            ["demo", f"--target={target}", f"--drafter={out / 'stage2'}", f"--prompts={home / 'prompts.jsonl'}"]
            + ["--limit=1", "--max-new-tokens=8"],
            ["export", str(out / "stage2"), "--format=vllm", f"--target={target}", f"--out={out / 'vllm'}"],
            ["import", str(out / "vllm"), f"--target={target}", f"--out={out / 'back'}"],
        ]
        for command in walk:
            assert cli.main(command) == 0, (command, capsys.readouterr().err)
        found[name] = PPOWDrafter.from_pretrained(out / "back").state_dict()
        record = json.loads((out / "stage2" / "provenance.json").read_text())
        assert record["weights"]["target"] == fingerprint(home / name) is not None
    one, two = found.values()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_file_that_is_named_is_read_not_one_of_its_name_here(home, tmp_path, monkeypatch, tiny_config):
    (tmp_path / "a").mkdir()
    shutil.copyfile(home / "target.gguf", tmp_path / "a" / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"another")
    monkeypatch.chdir(tmp_path)
    expected = LlamaForCausalLM.from_pretrained(home / "target").state_dict()
    for name in ("a/m.gguf", tmp_path / "a" / "m.gguf"):
        loaded = loading.load_model(name).state_dict()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="transformers would read ./m.gguf"):
        loading.check_model("target", "org/name/m.gguf")


def test_answers_end_with_a_turn_too(home, tmp_path, tiny_config, tiny_tokenizer):
    """transformers reads the end of a text alone; chats end with the end of a turn."""
    path = tmp_path / "target.gguf"
    write_gguf(path, LlamaForCausalLM(tiny_config), tiny_tokenizer, eos=0, eot=tiny_tokenizer.eos_token_id)
    assert loading.load_model(path).generation_config.eos_token_id == [0, tiny_tokenizer.eos_token_id]


def test_what_cannot_be_read_is_told_at_once(home, tmp_path):
    with pytest.raises(ValueError, match=r"--target \S*nothing.gguf: there is no such file"):
        loading.check_model("target", tmp_path / "nothing.gguf")
    with pytest.raises(ValueError, match=r"--drafter \S*target.gguf is a GGUF file; a drafter in one is for llama.cpp"):
        loading.check_model("drafter", home / "target.gguf")
    (tmp_path / "torn.gguf").write_bytes((home / "target.gguf").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"--target \S*torn.gguf"), loading.named("target", tmp_path / "torn.gguf"):
        loading.load_tokenizer(tmp_path / "torn.gguf")
    assert cli.main(["import", "x", f"--target={tmp_path / 'torn.gguf'}"]) == 2  # no traceback


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("/nowhere/a/b.gguf", ("/nowhere/a", "b.gguf")),
        ("org/name/file.Q4_K_M.gguf", ("org/name", "file.Q4_K_M.gguf")),
        ("org/name", ("org/name",)),
    ],
)
def test_where_a_name_leads(name, place):
    assert tuple(loading.place_of(name).values()) == place
