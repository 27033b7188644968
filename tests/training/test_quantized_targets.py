"""A target that was saved quantized, its embeddings too, in the commands that read one."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from ppow import PPOWDrafter
from ppow.training import cli
from ppow.training.preparation import _values


def test_from_training_to_the_doctor(tmp_path, save_target, tiny_tokenizer, capsys):
    quantization = pytest.importorskip("torchao.quantization", reason="needs: pip install torchao")
    save_target(tmp_path / "plain")
    int8 = TorchAoConfig(quantization.Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=int8, dtype=torch.float32)
    target.save_pretrained(tmp_path / "int8")
    tiny_tokenizer.save_pretrained(tmp_path / "int8")
    data = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "One and two make three."}]
    data.write_text(f"{json.dumps({'messages': chat})}\n" * 4)
    name, stage, figures = f"--target={tmp_path / 'int8'}", tmp_path / "stage1", tmp_path / "figures"
    commands = [
        [
            "supervised",
            name,
            f"--data={data}",
            f"--output-dir={stage}",
            "--steps=1",
            "--max-length=64",
            "--ttt-steps=2",
        ],
        ["evaluate", name, f"--drafter={stage}", f"--output-dir={figures}", f"--prompts={data}", "--limit=1"]
        + ["--temperatures=0", "--max-new-tokens=8"],
        ["doctor", name, f"--drafter={stage}", f"--data={data}", "--limit=2", f"--output={tmp_path / 'report.json'}"],
    ]
    for command in commands:
        assert cli.main([*command, "--dtype=float32"]) == 0, (command, capsys.readouterr().err)
    begun = PPOWDrafter.from_pretrained(stage).embed_tokens.weight
    values = target.get_input_embeddings().weight.dequantize()
    torch.testing.assert_close(begun, values, rtol=0, atol=0)
    assert json.loads((figures / "metrics.json").read_text())["results"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert "bfloat16" not in json.dumps(report)  # a quantized target has no other dtype to be tried in


def test_packed_embeddings_are_refused():
    with pytest.raises(ValueError, match="quantized to torch.uint8.*llm_int8_skip_modules"):
        _values(torch.zeros(8, 1, dtype=torch.uint8))
