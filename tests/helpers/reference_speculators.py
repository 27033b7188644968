"""Run in an environment of its own, with the speculators package of PyPI: logits of its drafters through its own code.

python reference_speculators.py read FOLDER INPUTS LOGITS     load a checkpoint, as its users do
python reference_speculators.py write FOLDER INPUTS LOGITS    make a random drafter, save it, and run it
"""

import sys

import torch
from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig, Qwen3Config

ATTENTION = "eager"  # their default, flex attention, wants a compiler


def make(options: dict) -> Eagle3DraftModel:
    """A drafter with random weights and a draft vocabulary of scattered tokens."""
    layer_class = Qwen3Config if options.pop("qwen3") else LlamaConfig
    d2t, t2d, layer = (options.pop(key) for key in ("d2t", "t2d", "layer"))
    proposal = GreedyTokenProposalConfig(proposal_type="greedy", speculative_tokens=5)
    speculators = SpeculatorsConfig(
        algorithm="eagle3",
        proposal_methods=[proposal],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
    )
    layer = layer_class(**layer, attn_implementation=ATTENTION)
    config = Eagle3SpeculatorConfig(transformer_layer_config=layer, speculators_config=speculators, **options)
    model = Eagle3DraftModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 if parameter.dim() > 1 else 1.0)
    if d2t is not None:
        model.load_vocab_mappings(t2d, d2t)
    return model


def run(model: Eagle3DraftModel, inputs: dict) -> list[torch.Tensor]:
    """The logits (1, T, D) of each step of training-time test."""
    found = []
    model.lm_head.register_forward_hook(lambda module, given, out: found.append(out.detach()))
    with torch.no_grad():
        model.eval()(
            hidden_states=inputs["taps"],
            input_ids=inputs["tokens"],
            document_ids=torch.zeros_like(inputs["tokens"]),
            ttt_steps=inputs["steps"],
        )
    return found


def main(action: str, folder: str, inputs: str, logits: str) -> None:
    given = torch.load(inputs)
    if action == "write":
        model = make(given["options"])
        model.save_pretrained(folder)
    else:
        config = SpeculatorModelConfig.from_pretrained(folder)
        config.transformer_layer_config._attn_implementation = ATTENTION
        model = SpeculatorModel.from_pretrained(folder, config=config)
        assert type(model) is Eagle3DraftModel
    torch.save(run(model.float(), given), logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
