"""Tiny targets of every architecture that transformers knows, and what drafting makes of each.

    python -m tests.helpers.tiny_targets     (writes docs/targets.md, in some minutes)

A configuration is made small by the names of its fields; what an architecture needs besides stands in ``SPECIAL``.
"""

import inspect
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ppow import PPOWConfig, PPOWDrafter, pair_ppow
from ppow.drafting_ppow import DraftWindow
from ppow.masks_ppow import ancestors_of
from ppow.target_ppow import check_kind

TABLE = Path(__file__).parents[2] / "docs" / "targets.md"
VOCAB, LAYERS = 64, 4
WINDOW = 6  # of local attention, so that short texts cross its border
NEW = 10
_SIZES = {
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size shape_vocab_size",
    32: "hidden_size d_model n_embd dim embedding_size emb_dim",
    48: "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim inner_dim dim_ff",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank mamba_d_head "
    "expert_ffn_hidden_size",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "
    "num_decoder_layers num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim qk_rope_head_dim mamba_n_heads",
    2: "num_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk zero_expert_num index_n_heads "
    "sep_token_id",
    8: "head_dim global_head_dim qk_nope_head_dim hidden_size_per_layer_input index_topk index_head_dim state_size "
    "query_pre_attn_scalar kv_channels mamba_d_state swa_head_dim linear_head_dim linear_key_head_dim "
    "linear_value_head_dim",
    WINDOW: "v_head_dim sliding_window window_size sliding_window_size",
    1: "n_shared_experts n_group topk_group first_k_dense_replace bos_token_id decoder_start_token_id",
    512: "max_position_embeddings n_positions max_seq_len",
    0: "pad_token_id",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SPECIAL: dict[str, dict] = {
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": {"vision_config": {**_VISION, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "kolibri1": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},  # as its checkpoints; the class's default has no conv
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": (16, 16)},
    "zaya": {"num_experts_per_tok": 1},
}

# Their small configurations contradict themselves, or need what is not installed.
UNBUILT = {
    "blt": "has parts of full size",
    "dots3_note": "needs parts that fit each other",
    "gemma3n": "needs timm",
    "gemma4_assistant": "needs parts that fit each other",
    "qwen4_exp": "needs sizes of its own",
    "qwen4_exp_text": "needs sizes of its own",
    "zamba": "shares layers by number",
    "zamba2": "shares layers by number",
}

HEAD = """# Which targets are served

Every causal language model of transformers {version}. Each was built tiny with random weights, where possible, and run
with and without windows: chains and trees, a row alone and a batch padded on the left. `right`: the same tokens.
`refused`: a `ValueError` before any token. `not tried`: it could not be built tiny, for the reason beside it. Written
by `python -m tests.helpers.tiny_targets`; `tests/decoding/test_targets.py` checks it.

What is not in this table (remote code, other image-text classes, other versions), or was not tried, is tried out when
it is first used, see `modeling_ppow/probe_ppow.py`. RoPE that follows the length of the text (longrope, dynamic) is
served on either side of the length at which it changes (dynamic: below it); a call that would cross it is refused."""


class NotTiny(Exception):
    """A class of parts whose sizes nothing here names; its text part mostly has a model type of its own."""


class Fault(AssertionError):
    """A target that is neither right nor refused before any token."""


def causal_classes() -> dict[str, str]:
    """Model type -> class of every causal language model of the installed transformers."""
    return {kind: name for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if hasattr(transformers, name)}


def tiny_config(kind: type, overrides: dict | None = None):
    """A configuration of class ``kind`` with everything small whose name we know."""
    names = set(getattr(kind, "__dataclass_fields__", {})) | set(inspect.signature(kind.__init__).parameters)
    chosen = {name: size for name, size in SMALL.items() if name in names}
    chosen |= {
        name: value
        for name, value in (("eos_token_id", None), ("is_decoder", True), ("use_cache", True))
        if name in names
    }
    if {"kv_lora_rank", "num_key_value_heads"} <= names:  # latent attention makes keys for every head
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if name in names and part.__name__ != "AutoConfig":
            chosen[name] = tiny_config(part)
    return kind(**{**chosen, **(overrides or {})})


def build(model_type: str, attention: str = "sdpa", **overrides):
    """A random target of that type, in float32; with eager attention where it has no other."""
    kind = getattr(transformers, causal_classes()[model_type])
    config = tiny_config(kind.config_class, {**SPECIAL.get(model_type, {}), **overrides})
    config._attn_implementation = attention
    try:
        size = parameters_of(kind, config)
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise
        config._attn_implementation = "eager"
        size = parameters_of(kind, config)
    if size > 12e6:  # before any memory is taken: sizes that nothing here names are those of real models
        with torch.device("meta"):
            check_kind(kind(config))
        raise NotTiny(f"{size / 1e6:.0f} million parameters")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = kind(config)
        for weight in model.parameters():
            if weight.dim() >= 2:  # large enough for every part to show in the logits
                torch.nn.init.normal_(weight, std=0.3)
    return model.float().eval()


def parameters_of(kind: type, config) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in kind(config).parameters())


class Oracle:
    """Stands in for the drafter's windows: they hold the target's own next tokens, wrong ones, and for every second
    row an early mistake, so that whole windows, branches and rows of unequal speed occur."""

    def __init__(self, text: torch.Tensor, vocab_size: int):
        self.text, self.vocab_size, self.calls = text, vocab_size, 0

    def __call__(self, state, root, options, room, *more) -> DraftWindow:
        self.calls += 1
        steps = torch.arange(min(4, room) + 1)
        place = (state.lengths[:, None] + steps).clamp(max=self.text.shape[1] - 1)
        right = self.text.gather(1, place)
        right[:, 0] = root
        if room >= 2:
            right[1::2, 2] = (right[1::2, 2] + 1) % self.vocab_size
        if not options.is_tree:
            return DraftWindow.chain(right)
        tokens, parents, depth, last = [right[:, :1]], [0], [0], 0
        for step in range(1, right.shape[1]):
            for wrong in range(1, 4):
                tokens.append((right[:, step : step + 1] + wrong) % self.vocab_size)
            tokens.append(right[:, step : step + 1])
            parents, depth, last = [*parents, *[last] * 4], [*depth, *[step] * 4], len(parents) + 3
        shape = (len(root), -1)
        parents, depth = torch.tensor(parents).expand(shape), torch.tensor(depth).expand(shape)
        return DraftWindow(torch.cat(tokens, 1), parents, depth, ancestors_of(parents, len(steps)), int(depth.max()))


def verdict(target, brief: bool = False) -> tuple[str, str]:
    """Generate with and without windows, alone and in a padded batch, as chains and trees.

    Args:
        brief: the padded batch is enough.

    Returns:
        ("right" or "refused", why).

    Raises:
        Fault: other tokens, or an error that is no ValueError or comes behind the first token.
    """
    try:
        drafter = PPOWDrafter(
            PPOWConfig.from_target(
                target.config,
                max_position_embeddings=512,
                intermediate_size=32,
                head_dim=8,
                num_key_value_heads=4,
            )
        ).eval()
    except ValueError as error:
        return "refused", str(error)
    ids = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    modes = {"window_size": 4}, {"tree_depth": 4, "tree_top_k": 4, "tree_nodes": 16}
    for rows in (slice(0, 1), slice(0, 2))[brief:]:
        asked = {
            "input_ids": ids[rows],
            "attention_mask": mask[rows],
            "do_sample": False,
            "max_new_tokens": NEW,
            "pad_token_id": 0,
        }
        plain, why = None, ""
        try:
            plain = target.generate(**asked)
        except Exception as error:  # a class that needs more than ids; drafting must refuse it too
            why = f"plain generate() ends in {type(error).__name__}"
        for mode in modes:
            oracle = Oracle(torch.zeros(0) if plain is None else plain, target.config.get_text_config().vocab_size)
            before = pair_ppow.draft
            pair_ppow.draft = oracle
            for name, value in mode.items():
                setattr(drafter.generation_config, name, value)
            try:
                ours = target.generate(**asked, assistant_model=drafter)
            except Exception as error:
                if oracle.calls or (plain is not None and not isinstance(error, ValueError)):
                    raise Fault(f"{type(target).__name__} {mode}: {type(error).__name__}: {error}") from error
                return "refused", str(error) if isinstance(error, ValueError) else why
            finally:
                pair_ppow.draft = before
                for name in mode:
                    setattr(drafter.generation_config, name, None)
            if plain is None or not torch.equal(plain, ours):
                raise Fault(f"{type(target).__name__}, {len(ids[rows])} rows, {mode}: other tokens than without")
    return "right", ""


def reason(why: str) -> str:
    """A refusal in a few words that do not depend on the machine."""
    for start in ("is not served: ", "was not made"):
        if start in why:
            why = why.split(start, 1)[1]
    why = why.split(" (relative", 1)[0].split(", so drafting", 1)[0].split(". ", 1)[0]
    return why.replace("\n", " ").replace("|", "/")[:160]


def row_of(model_type: str, attention: str = "sdpa", brief: bool = False) -> tuple[str, str]:
    """Verdict and reason for the tiny target of a model type."""
    if model_type in UNBUILT:
        return "not tried", UNBUILT[model_type]
    try:
        target = build(model_type, attention)
    except NotTiny:
        return "not tried", "has parts of full size"
    except ValueError as error:
        if "PPOW" not in str(error):
            raise
        return "refused", reason(str(error))
    outcome, why = verdict(target, brief)
    return outcome, reason(why)


def read_table() -> tuple[str, dict[str, tuple[str, str]]]:
    """docs/targets.md: -> its transformers version, and model type -> (verdict, reason)."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    version = next(line for line in lines if "transformers " in line).split("transformers ")[1].split()[0].rstrip(".,")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return version, {row[0].strip("`"): (row[2], row[3]) for row in rows}


def main(chosen: list[str]) -> None:
    classes, rows, faults = causal_classes(), {}, []
    for model_type in chosen or classes:
        try:
            rows[model_type] = row_of(model_type)
        except Exception as error:
            faults.append(f"{model_type}: {type(error).__name__}: {str(error)[:300]}")
            rows[model_type] = ("FAULT", faults[-1])
        print(model_type, *rows[model_type], flush=True)
    print(f"{len(faults)} faults", *faults, sep="\n")
    if chosen or faults:
        return
    counts = {word: sum(row[0] == word for row in rows.values()) for word in ("right", "refused", "not tried")}
    lines = [
        *HEAD.format(version=transformers.__version__).splitlines(),
        "",
        ", ".join(f"{count} {word}" for word, count in counts.items()) + ".",
        "",
        "| model type | class | verdict | why |",
        "|---|---|---|---|",
        *(f"| `{kind}` | {classes[kind]} | {word} | {why} |" for kind, (word, why) in rows.items()),
    ]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
