"""Drafters as one GGUF file, llama.cpp's: what stands in it, there and back, and what is refused.

The round trips over the product of features are in test_formats.py; that llama.cpp runs it is ``make engines``' word.
"""

import json

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import small_pair
from decoding_helpers import LLAMA3
from formats_helpers import TARGET, D, V, build, gguf_tokens, logits
from gguf_target import write_gguf as write_target
from ppow import PPOWDrafter
from ppow.training import cli
from ppow.training.convert import import_checkpoint
from ppow.training.export_formats import from_ppow
from ppow.training.gguf_format import OWN_ROPE, read_gguf, write_gguf


def written(drafter, folder, change=lambda config, tensors: None):
    """The drafter as a GGUF file, after ``change`` of what would stand in it."""
    exported = from_ppow(drafter.config, drafter.state_dict(), "gguf", TARGET)
    change(exported.config, exported.tensors)
    file = folder / "drafter.gguf"
    write_gguf(exported.config, exported.tensors, gguf_tokens(folder), file)
    return file


def test_names_and_metadata_are_those_of_llama_cpps_converter(tmp_path):
    drafter = build("norm_before_fc", "3 other taps")
    reader = gguf.GGUFReader(written(drafter, tmp_path))
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "eagle3" and values["eagle3.target_layers"] == [1, 3, 6]
    assert values["eagle3.target_hidden_size"] == 32 and values["eagle3.norm_before_fc"] is True
    assert values["eagle3.norm_before_residual"] is False and values["eagle3.attention.head_count_kv"] == 2
    assert values["eagle3.context_length"] == 256 and values["eagle3.rope.freq_base"] == 5000.0
    assert values["tokenizer.ggml.tokens"] == [f"t{i}" for i in range(V)] and values["tokenizer.ggml.eos_token_id"] == 2
    stored = {tensor.name: tensor for tensor in reader.tensors}
    blocks = "attn_norm attn_norm_2 attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down"
    assert stored.keys() == {f"blk.0.{name}.weight" for name in blocks.split()} | {
        *("token_embd.weight", "fc.weight", "enc.output_norm.weight", "output_norm.weight", "output.weight", "d2t")
    }
    assert stored["d2t"].tensor_type.name == "I64" and stored["d2t"].data.tolist() == drafter.draft_columns().tolist()
    assert list(stored["output.weight"].shape) == [32, D]  # llama.cpp's order of sizes


def test_rows_of_q_and_k_lie_as_llama_cpp_rotates_them(tmp_path):
    """Of a head of 8, llama.cpp rotates rows 0 and 1 together; transformers 0 and 4."""
    drafter = build()
    reader = gguf.GGUFReader(written(drafter, tmp_path))
    found = next(torch.from_numpy(t.data.copy()) for t in reader.tensors if t.name == "blk.0.attn_k.weight")
    own = drafter.layers[0].self_attn.k_proj.weight
    assert torch.equal(found[:8], own[[0, 4, 1, 5, 2, 6, 3, 7]])


def test_sixteen_bits_come_back_as_they_were(tmp_path):
    drafter = build("the target's embeddings").to(torch.bfloat16)
    drafter.config.dtype = torch.bfloat16
    file = written(drafter, tmp_path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["fc.weight"] == "BF16" and kinds["output_norm.weight"] == "F32" and "token_embd.weight" not in kinds
    imported = import_checkpoint(str(file), TARGET, PPOWDrafter)
    weights = drafter.state_dict()
    assert imported.config.dtype == torch.bfloat16 and imported.tensors.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in imported.tensors.items())


def test_rope_factors_of_a_converted_drafter_are_the_targets(tmp_path):
    """llama.cpp's converter leaves the parameters out, which we keep under a key of our own."""
    drafter = build("RoPE of type llama3")
    file = written(drafter, tmp_path, lambda config, tensors: config.pop(OWN_ROPE))
    target = LlamaConfig(**{**TARGET.to_dict(), "rope_parameters": LLAMA3})
    assert import_checkpoint(str(file), target, PPOWDrafter).config.rope_parameters == LLAMA3
    with pytest.raises(ValueError, match="RoPE factors that are not the target's"):
        import_checkpoint(str(file), TARGET, PPOWDrafter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, t: t.update({"blk.0.nextn.weight": torch.ones(3)}),
            "holds blk.0.nextn.weight, which no drafter has",
        ),
        (lambda c, t: c.pop("eagle3.attention.head_count"), "how many heads of which size"),
        (lambda c, t: c.update({"eagle3.rope.scaling.type": "yarn"}), "RoPE scaled by 'yarn' is not supported"),
        (lambda c, t: c.update({"eagle3.target_layers": [1, 3]}), r"48 for each of the taps \[1, 3\]"),
        (lambda c, t: t.pop("fc.weight"), "lacks fc.weight"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, change, message):
    file = written(build(), tmp_path, change)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(str(file), TARGET, PPOWDrafter)


def test_files_that_hold_no_drafter(tmp_path):
    with pytest.raises(ValueError, match="architecture 'llama'; a drafter's is 'eagle3'"):
        read_gguf(gguf_tokens(tmp_path), TARGET)
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(ValueError, match="could not be read as a GGUF file"):
        read_gguf(str(tmp_path / "text.gguf"), TARGET)
    exported = from_ppow(build().config, build().state_dict(), "gguf", TARGET)
    with pytest.raises(ValueError, match=f"names 7 tokens, the drafter's vocabulary has {V}"):
        write_gguf(exported.config, exported.tensors, gguf_tokens(tmp_path, 7), tmp_path / "drafter.gguf")


def test_quantized_drafters_are_sent_back(tmp_path):
    drafter = build()
    file = written(drafter, tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "eagle3")
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name == "fc.weight":
            data = gguf.quantize(tensor.data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"fc.weight is quantized \(Q8_0\); import the file in 16 or 32 bit"):
        read_gguf(str(tmp_path / "q8.gguf"), TARGET)


def test_the_command_there_and_back(tmp_path, monkeypatch, capsys):
    """With the trained pair: the target as llama.cpp has it, the drafter to its format and home again."""
    monkeypatch.chdir(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(small_pair.TARGET, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(small_pair.TARGET)
    write_target(tmp_path / "target.gguf", target, tokenizer)
    drafter = str(small_pair.DRAFTER)
    assert cli.main(["export", drafter, "--format", "gguf", "--target", "target.gguf"]) == 0
    folder = tmp_path / "drafter-gguf"
    assert [path.name for path in folder.iterdir()] == ["drafter.gguf"]
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == (
        f"llama-server -m target.gguf -md {folder}/drafter.gguf --spec-type draft-eagle3 --spec-draft-n-max "
        f"{json.loads((small_pair.DRAFTER / 'generation_config.json').read_text())['window_size']}"
    )
    assert cli.main(["import", str(folder / "drafter.gguf"), "--target", str(small_pair.TARGET), "--out", "back"]) == 0
    own, back = (PPOWDrafter.from_pretrained(place, dtype=torch.float32) for place in (drafter, "back"))
    assert torch.equal(logits(back), logits(own))
    assert cli.main(["export", drafter, "--format", "gguf", "--target", str(small_pair.TARGET)]) == 2
    assert "give --target the GGUF file of the target" in capsys.readouterr().err
