"""DFlash checkpoints in, block drafters out; and transformers' own DFlash loop beside ours."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from decoding_helpers import PAD, block_drafter, build_target, generate_with, prompt_batches
from ppow import PPOWBlockDrafter, PPOWDrafter
from ppow.training import cli
from ppow.training.block_formats import from_dflash, to_dflash
from ppow.training.blocks import Blocks
from ppow.training.import_formats import Known
from ppow.training.target import FrozenTarget

DFLASH = {"predict_from_anchor": False, "mask_token_id": 40}


@pytest.fixture(scope="module")
def target():
    return build_target("qwen3", initializer_range=0.2)


def zlab(drafter, nested: bool) -> dict:
    """A config.json as z-lab's repositories have it, of an older or a newer layout."""
    own, config = (
        {"mask_token_id": 40, "target_layer_ids": [tap - 1 for tap in drafter.config.target_taps]},
        {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 8,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 64,
            "layer_types": ["full_attention"] * 2,
            "max_position_embeddings": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "num_target_layers": 4,
            "rms_norm_eps": drafter.config.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "vocab_size": 48,
        },
    )
    (own if nested else config)["block_size"] = 6
    return {**config, "dflash_config": own}


@pytest.mark.parametrize("anchor", [True, False])
def test_a_round_trip_is_bit_exact(target, anchor):
    drafter = block_drafter(target, **{**DFLASH, "predict_from_anchor": anchor})
    exported = to_dflash(drafter.config, drafter.state_dict())
    back = from_dflash(exported.config, exported.tensors, target.config, PPOWDrafter)
    assert all(torch.equal(value, back.tensors[name]) for name, value in drafter.state_dict().items())
    ours, theirs = (config.to_dict() for config in (drafter.config, back.config))
    assert {key for key in ours if ours[key] != theirs[key]} <= {"dtype", "transformers_version"}


@pytest.mark.parametrize("nested", [True, False])
def test_a_checkpoint_in_z_labs_layout_drafts_for_its_target(target, nested, tmp_path, capsys):
    drafter = block_drafter(target, **DFLASH)
    folder, model = tmp_path / "dflash", tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(zlab(drafter, nested)))
    save_file(
        {name: tensor.contiguous() for name, tensor in drafter.state_dict().items()}, folder / "model.safetensors"
    )
    target.save_pretrained(model)
    cli.main(["import", str(folder), "--target", str(model), "--out", str(tmp_path / "ours")])
    assert "target_layer_ids [0, 1, 2]" in capsys.readouterr().out
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    expected = generate_with(target, drafter, ids, config={"max_new_tokens": 12})
    for found in (
        PPOWDrafter.from_pretrained(tmp_path / "ours"),
        PPOWDrafter.from_pretrained(folder, target=target),
    ):
        assert type(found) is PPOWBlockDrafter
        out = generate_with(target, found, ids, config={"max_new_tokens": 12})
        assert out.acceptance.accepted == expected.acceptance.accepted
    cli.main(["export", str(tmp_path / "ours"), "--format", "dflash", "--out", str(tmp_path / "back")])
    assert '"method": "dflash"' in capsys.readouterr().out and (tmp_path / "back" / "config.json").exists()
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(value, back[name]) for name, value in load_file(folder / "model.safetensors").items())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (
        written["dflash_config"] == {"mask_token_id": 40, "target_layer_ids": [0, 1, 2]} and written["block_size"] == 6
    )
    assert cli.main(["export", str(tmp_path / "ours"), "--format", "vllm", "--out", str(tmp_path / "no")])
    assert "for the other kind" in capsys.readouterr().err


def test_what_cannot_be_imported_or_exported_is_named(target):
    drafter = block_drafter(target, **DFLASH)
    config, tensors = zlab(drafter, False), drafter.state_dict()

    def read(changes, tensors=tensors):
        return from_dflash({**config, **changes}, tensors, target.config, PPOWDrafter)

    for changes, match in (
        ({"block_size": None}, "block_size"),
        ({"dflash_config": {"mask_token_id": 40}}, "target_layer_ids"),
        ({"num_target_layers": 36}, "made for a target of 36 layers"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding window"),
    ):
        with pytest.raises(ValueError, match=match):
            read(changes)
    told = from_dflash(config, tensors, target.config, PPOWDrafter, Known(taps=[1, 2, 4], rope_theta=5e4))
    assert told.config.target_taps == [1, 2, 4] and told.config.rope_parameters["rope_theta"] == 5e4
    with pytest.raises(ValueError, match="norm_output: DFlash's layers leave no choice"):
        from_dflash(config, tensors, target.config, PPOWDrafter, Known(norm_output=True))
    with pytest.raises(ValueError, match="vocabulary of its own"):
        read({}, {**tensors, "d2t": torch.zeros(9)})
    with pytest.raises(ValueError, match="no DFlash drafter that PPOW can run: it lacks hidden_norm.weight"):
        read({}, {name: value for name, value in tensors.items() if name != "hidden_norm.weight"})
    for own in ({"markov_rank": 2}, {"markov_rank": 0, "draft_vocab_size": 30}):
        other = block_drafter(target, **own)
        with pytest.raises(ValueError, match=list(own)[-1]):
            to_dflash(other.config, other.state_dict())
    other = block_drafter(target, confidence_head=True)  # ends windows, and changes no draft
    exported = to_dflash(other.config, other.state_dict())
    assert not [name for name in exported.tensors if "confidence" in name]
    assert [row for row in exported.rows if row.action == "dropped" and row.what == "confidence_head"]


@pytest.mark.skipif(not hasattr(transformers, "MuseGlimmerAssistantModel"), reason="this transformers has no DFlash")
@torch.no_grad()
def test_transformers_own_dflash_drafter_computes_the_same_and_its_loop_writes_the_same(target):
    drafter, names = block_drafter(target, **DFLASH), {"fc.": "encoder.fc.", "hidden_norm.": "encoder.output_norm_enc."}
    fields = zlab(drafter, False)
    fields |= {"target_layer_ids": [0, 1, 2], "mask_token_id": 40, "sliding_window": 512}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    for name in ("architectures", "model_type", "dflash_config", "vocab_size", "rope_scaling", "rope_theta"):
        del fields[name]
    known = {"num_target_layers", "attention_bias"}
    config = transformers.MuseGlimmerAssistantConfig(**{k: v for k, v in fields.items() if k not in known})
    other = transformers.MuseGlimmerAssistantModel(config).to(target.dtype).eval()
    renamed = {}
    for name, tensor in drafter.state_dict().items():
        old = next((old for old in names if name.startswith(old)), "")
        renamed[names.get(old, "") + name.removeprefix(old)] = tensor
    other.load_state_dict(renamed)
    ids = torch.randint(1, 40, (1, 9), generator=torch.Generator().manual_seed(2))
    taps, words = FrozenTarget(target, drafter.config.target_taps).read(ids).taps, drafter.embedding_for(target)
    blocks = Blocks(drafter, words, ids, taps)
    blocks.begin(torch.tensor([[6]]))
    noise = words(torch.tensor([[int(ids[0, 7])] + [40] * 5]))
    features = other(noise_embeds=noise, context_hidden_states=taps[:, :7]).last_hidden_state
    torch.testing.assert_close(blocks.slots[0, 0], features[0, 1:], atol=1e-5, rtol=1e-5)
    for ids, mask in prompt_batches(1, 2, seed=3):
        settings = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "pad_token_id": PAD}
        theirs = target.generate(ids, assistant_model=other, speculation_type="dflash", **settings)
        ours = generate_with(target, drafter, ids, mask, {"max_new_tokens": 14})
        assert torch.equal(ours.sequences, theirs)
