"""One training step of the `speculators` package's EAGLE-3 drafter, on the pair and the text of benchmarks/rollouts.py.

Its own model, attention and loss (KL, fused where that runs), called as its trainer calls them: float32 weights under
autocast, the forward compiled by torch on a GPU. Given what its data pipeline would deliver, the target's hidden
states, which are computed within the step as in ours. Made equal to our stage 1: the trained weights (it would freeze
the head), the draft steps, the weights of the losses. It needs no logits over the whole vocabulary; ours reads them, to
know what verification will choose.
"""

import importlib.util

import torch

AVAILABLE = importlib.util.find_spec("speculators") is not None


def working_step(target, drafter, batch, *settings):
    """:func:`speculators_step` with its fused loss on a GPU, else its plain one: -> the step or None, its loss, errors.

    A package that this torch cannot run must not cost the figures of ours.
    """
    errors = {}
    for kind in ("fused", "eager") if batch.input_ids.is_cuda else ("eager",):
        step = speculators_step(target, drafter, batch, *settings, kind=kind)
        try:
            step()
            return step, kind, errors
        except Exception as error:  # torch's compiler alone raises half a dozen kinds
            errors[kind] = f"{type(error).__name__}: {error}"[:300]
            print(f"The step of speculators does not run with its {kind} loss: {errors[kind]}")
        del step  # with its weights
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return None, None, errors


def speculators_step(target, drafter, batch, ttt_steps: int, step_weight: float, dtype: torch.dtype, kind: str):
    """-> a function that takes one step: the target's forward, theirs, backward, AdamW; -> loss ().

    Args:
        target: FrozenTarget; drafter: ours, for the draft vocabulary, the taps and weights to start from.
        batch: one text.
        kind: of their loss, "fused" (Triton kernels) or "eager".
    """
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    device, config = batch.input_ids.device, target.model.config
    layer = type(config)(**{**config.to_dict(), "num_hidden_layers": drafter.config.num_hidden_layers})
    layer._attn_implementation = "simple_flex_attention" if device.type == "cuda" else "eager"
    verifier = VerifierConfig(name_or_path=None, architectures=config.architectures or [type(target.model).__name__])
    proposal = GreedyTokenProposalConfig(speculative_tokens=ttt_steps)
    names = {"algorithm": "eagle3", "proposal_methods": [proposal], "default_proposal_method": "greedy"}
    with torch.device(device):
        model = Eagle3DraftModel(
            Eagle3SpeculatorConfig(
                transformer_layer_config=layer,
                draft_vocab_size=drafter.config.draft_vocab_size,
                eagle_aux_hidden_state_layer_ids=list(drafter.config.target_taps),
                speculators_config=SpeculatorsConfig(**names, verifier=verifier),
            )
        )
    model = model.to(device, torch.float32).train()
    model.verifier_norm = torch.nn.Identity()  # the decoder's last state, given below, is normalised already
    with torch.no_grad():
        head = target.model.get_output_embeddings().weight[drafter.draft_columns()]
        model.embed_tokens.weight.copy_(target.model.get_input_embeddings().weight)
        for own in (model.lm_head, model.verifier_lm_head):
            own.weight.copy_(head)
    model.lm_head.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    losses = resolve_loss_config("kl_div", kind)
    decoder, taps, ids = target.model.get_decoder(), drafter.config.target_taps, batch.input_ids

    room = -(ids.shape[1] - 1) % 128  # its attention takes whole blocks of 128; what is put behind counts nowhere

    def filled(values: torch.Tensor) -> torch.Tensor:  # (1, T - 1, ..) -> (1, n * 128, ..)
        return torch.cat((values, values.new_zeros(1, room, *values.shape[2:])), 1)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                states = decoder(ids, output_hidden_states=True, use_cache=False)
                tapped = torch.cat([states.hidden_states[tap] for tap in taps], -1)
            following = filled(ids[:, 1:])
            _, loss, _ = model(
                hidden_states=filled(tapped[:, :-1].to(dtype)),
                input_ids=following,
                document_ids=torch.zeros_like(following),
                loss_mask=filled(batch.loss_mask[:, 1:]),
                position_ids=torch.arange(1, following.shape[1] + 1, device=device)[None],
                verifier_last_hidden_states=filled(states.last_hidden_state[:, 1:].to(dtype)),
                ttt_steps=ttt_steps,
                ttt_step_loss_decay=step_weight,
                loss_config=losses,
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    step.model = model
    return step
