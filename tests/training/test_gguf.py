"""Targets given as a GGUF file: the same model, in every command that reads a target."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gguf_target import write_gguf
from ppow import PPOWDrafter
from ppow.training import cli, loading
from ppow.training.fingerprints import fingerprint


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_tokenizer, tiny_config):
    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    target = LlamaForCausalLM(tiny_config)
    target.save_pretrained(folder / "target")
    tiny_tokenizer.save_pretrained(folder / "target")
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


def test_what_cannot_be_read_is_told_at_once(home, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--target \S*nothing.gguf: there is no such file"):
        loading.check_model("target", tmp_path / "nothing.gguf")
    with pytest.raises(ValueError, match=r"--drafter \S*target.gguf is a GGUF file; only targets are read from one"):
        loading.check_model("drafter", home / "target.gguf")
    (tmp_path / "torn.gguf").write_bytes((home / "target.gguf").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"--target \S*torn.gguf"), loading.named("target", tmp_path / "torn.gguf"):
        loading.load_tokenizer(tmp_path / "torn.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package gguf; run `pip install gguf`"):
        loading.check_model("target", home / "target.gguf")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("target.gguf", (".", "target.gguf")),
        ("/models/a/b.gguf", ("/models/a", "b.gguf")),
        ("org/name/file.Q4_K_M.gguf", ("org/name", "file.Q4_K_M.gguf")),
        ("org/name", ("org/name",)),
    ],
)
def test_where_a_name_leads(name, place):
    assert tuple(loading.place_of(name).values()) == place
