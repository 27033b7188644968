"""The peers' own words: EAGLE and SpecForge re-stated, speculators itself, and the loaders of vLLM and SGLang.

The slow ones need PyPI: ``pytest -m slow tests/sharing/test_formats_peers.py``. They make an environment of their own
for speculators (what is not a matter of its version, torch above all, comes from this one), and download the wheels of
vLLM and SGLang, whose engines are not run.

What the wheels prove: every exported name reaches a parameter that the engine's loader knows, of the shape that the
exported config makes it have, and nothing is dropped; and SGLang's drafter class, with stand-ins for its layers, then
computes the same numbers. What they do not prove: that SGLang's layers do; that needs a GPU and the engine.
"""

import ast
import functools
import itertools
import os
import subprocess
import sys
import sysconfig
import types
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from formats_helpers import EMBEDDINGS, TARGET, V, build, export, write
from ppow import PPOWDrafter
from ppow.training.export_formats import refusals
from ppow.training.unrolled import Unrolled
from reference_eagle3 import Eagle, SpecForge
from reference_sglang import SGLang

SPECULATORS = ["speculators==0.9.0", "hs-connectors==0.9.0"]
NEEDED_BY_SPECULATORS = ["transformers>=5.17,<=5.19", "loguru", "openai", "pydantic-settings", "typer"]
WHEELS = {"vllm": "0.33.0", "sglang": "0.5.23"}
TOLERANCE = 1e-5
STEPS = 3


def inputs(drafter: PPOWDrafter, batch: int = 2, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Text (B, T) and taps (B, T, n_taps * Ht)."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(1, V, (batch, length), generator=generator)
    return text, torch.randn(batch, length, drafter.fc.in_features, generator=generator)


def imported(folder: Path, config: dict, tensors: dict) -> PPOWDrafter:
    return PPOWDrafter.from_pretrained(write(folder, config, tensors), target=TARGET, dtype=torch.float32)


def scaled(*features: str) -> PPOWDrafter:
    """A drafter with weights as small as a trained one's: the bound on the difference is an absolute one."""
    drafter = build(*features)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() > 1:
                parameter.mul_(parameter.shape[1] ** -0.5)
    return drafter


def embed(drafter: PPOWDrafter) -> nn.Module:
    return drafter.get_input_embeddings() or nn.Embedding.from_pretrained(EMBEDDINGS)


def unroll(drafter: PPOWDrafter, text: torch.Tensor, taps: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Our logits of each step of training-time test: step i has the pairs that i more tokens follow."""
    with torch.no_grad():
        unrolled = Unrolled(drafter, embed(drafter), text, taps)
        pairs = text.shape[1] - 1
        found = [drafter.logits(unrolled.begin(torch.arange(pairs).expand(len(text), -1)))]
        padded = nn.functional.pad(text, (0, steps))  # what windows at the end are given does not matter
        for i in range(1, steps):
            found.append(drafter.logits(unrolled.advance(padded[:, 1 + i : 1 + i + pairs]))[:, : pairs - i])
    return found


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for own, their in zip(ours, theirs):
        assert own.abs().max() > 0.1  # it is not all zeros
        assert (own - their[:, : own.shape[1]]).abs().max() < TOLERANCE


# -- published model code, re-stated -----------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [(), ("D = V",), ("narrower than the target",), ("the target's embeddings",)])
def test_eagles_code_computes_the_same_logits(tmp_path, features):
    drafter = scaled(*features)
    config, tensors = export(drafter, "eagle")
    reference, ours = Eagle(config, tensors, EMBEDDINGS), imported(tmp_path, config, tensors)
    text, taps = inputs(drafter)
    drafted = torch.randint(1, V, (2, STEPS))
    theirs = reference.chain(text, taps[:, :-1], drafted)
    with torch.no_grad():
        unrolled = Unrolled(ours, embed(ours), text, taps)
        found = [ours.logits(unrolled.begin(torch.full((2, 1), text.shape[1] - 2)))]
        found += [ours.logits(unrolled.advance(tokens)) for tokens in drafted.split(1, dim=1)]
    assert_close([logits[:, 0] for logits in found], theirs)
    assert torch.equal(ours.draft_columns(), reference.target_ids())


@pytest.mark.parametrize(
    "features",
    [
        (),
        ("D = V",),
        ("3 other taps", "fc_norm"),
        ("narrower than the target", "fc_norm"),
        ("heads of another size than hidden_size / heads", "RoPE of type llama3"),
    ],
)
def test_specforges_code_computes_the_same_logits(tmp_path, features):
    drafter = scaled(*features)
    config, tensors = export(drafter, "specforge")
    text, taps = inputs(drafter)
    theirs = SpecForge(config, tensors, EMBEDDINGS).training_time_test(text, taps[:, :-1], STEPS)
    assert_close(unroll(imported(tmp_path, config, tensors), text, taps, STEPS), theirs)


# -- speculators itself ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def speculators(tmp_path_factory):
    """Runs reference_speculators.py in an environment that has the package of PyPI."""
    folder = tmp_path_factory.mktemp("speculators")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    site = next((folder / "env" / "lib").glob("python*")) / "site-packages"
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after its own: torch and the like
    online = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    for packages in (NEEDED_BY_SPECULATORS, ["--no-deps", *SPECULATORS]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, env=online)

    def run(action: str, checkpoint: Path, given: dict) -> list[torch.Tensor]:
        torch.save(given, folder / "inputs.pt")
        script = Path(__file__).parents[1] / "helpers" / "reference_speculators.py"
        command = [python, script, action, checkpoint, folder / "inputs.pt", folder / "logits.pt"]
        environment = {**online, "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(folder / "logits.pt")

    return run


CASES = [
    (),
    ("D = V",),
    ("the target's embeddings",),
    ("2 layers", "3 other taps", "norm_output"),
    ("4 taps", "fc_norm", "norm_before_residual"),
    ("Qwen3 style (norms on q and k)", "norm_before_fc", "norm_before_residual"),
    ("RoPE of type llama3", "heads of another size than hidden_size / heads"),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("features", CASES)
def test_speculators_loads_our_export_and_computes_the_same_logits(speculators, tmp_path, features):
    drafter = scaled(*features)
    config, tensors = export(drafter, "speculators")
    target = LlamaForCausalLM(TARGET)  # its loader opens the verifier, too
    with torch.no_grad():
        target.get_input_embeddings().weight.copy_(EMBEDDINGS)
    target.save_pretrained(tmp_path / "target")
    config["speculators_config"]["verifier"]["name_or_path"] = str(tmp_path / "target")
    text, taps = inputs(drafter, batch=1)
    given = {"taps": taps[:, :-1], "tokens": text[:, 1:], "steps": STEPS}
    theirs = speculators("read", write(tmp_path / "drafter", config, tensors), given)
    assert_close(unroll(drafter, text, taps, STEPS), theirs)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("features", [case for case in CASES if "the target's embeddings" not in case])
def test_what_speculators_saves_imports_with_the_same_logits(speculators, tmp_path, features):
    drafter = build(*features)
    config, _ = export(drafter, "speculators")
    kept = ("draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    options = {key: config[key] for key in (*kept, "eagle_aux_hidden_state_layer_ids")}
    options |= {"layer": config["transformer_layer_config"], "qwen3": drafter.config.qk_norm}
    options["layer"].pop("model_type")
    options |= {key: getattr(drafter, key) if drafter.pruned else None for key in ("d2t", "t2d")}
    text, taps = inputs(drafter, batch=1)
    given = {"taps": taps[:, :-1], "tokens": text[:, 1:], "steps": STEPS, "options": options}
    theirs = speculators("write", tmp_path / "saved", given)
    ours = PPOWDrafter.from_pretrained(tmp_path / "saved", target=TARGET, dtype=torch.float32)
    assert_close(unroll(ours, text, taps, STEPS), theirs)
    assert ours.config.target_taps == drafter.config.target_taps
    if drafter.pruned:
        assert torch.equal(ours.draft_columns(), drafter.draft_columns())


# -- the loaders of vLLM and SGLang ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """Engine -> its wheel, opened."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", "3.12", "--dest", str(folder)]
    for name, version in WHEELS.items():
        subprocess.run([*command, f"{name}=={version}"], check=True)
    return {name: zipfile.ZipFile(next(folder.glob(f"{name}-*.whl"))) for name in WHEELS}


@functools.cache
def source_of(wheel: zipfile.ZipFile, path: str) -> str:
    return wheel.read(path).decode("utf-8")


def class_of(source: str, name: str) -> ast.ClassDef:
    return next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)


def loader_of(source: str, name: str, world: dict):
    """The method ``load_weights`` of a class, alone, with stand-ins for everything that it calls."""
    method = next(node for node in class_of(source, name).body if getattr(node, "name", "") == "load_weights")
    method.returns = None
    for argument in method.args.args:
        argument.annotation = None
    scope = {"torch": torch, **world}
    exec(compile(ast.Module([method], []), name, "exec"), scope)
    return scope["load_weights"]


@functools.cache
def attributes(*sources: str) -> set[str]:
    """Every ``self.name = ...`` in them: the names that parameters of these modules can have."""
    nodes = itertools.chain.from_iterable(ast.walk(ast.parse(source)) for source in sources)
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


def parameters(config: dict) -> dict[str, list[int]]:
    """Names and shapes of the parameters that an engine makes of an exported config."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    count, wide = config.get("num_aux_hidden_states", 3), config.get("target_hidden_size", width)
    found = {
        "lm_head.weight": [config["draft_vocab_size"], width],
        "model.embed_tokens.weight": [config["vocab_size"], width],
        "model.fc.weight": [width, count * wide],
        "model.norm.weight": [width],
    }
    if config["norm_before_fc"]:
        found["model.input_norm.weight"] = [count * wide]
    if config["fc_norm"]:
        found |= {f"model.fc_norm.{i}.weight": [wide] for i in range(count)}
    for layer in range(config["num_hidden_layers"]):
        entering = width if layer else 2 * width  # embedding and features side by side
        own = {
            "self_attn.qkv_proj.weight": [(heads + 2 * kv_heads) * size, entering],
            "self_attn.o_proj.weight": [width, heads * size],
            "mlp.gate_up_proj.weight": [2 * inner, width],
            "mlp.down_proj.weight": [width, inner],
            **{f"{name}.weight": [width] for name in ("input_layernorm", "post_attention_layernorm", "hidden_norm")},
        }
        if config["model_type"] == "qwen3":
            own |= {f"self_attn.{name}_norm.weight": [size] for name in "qk"}
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return found


def assert_fills(config: dict, loaded: dict[str, list[torch.Tensor]], unused: str, names: set[str]) -> None:
    """The tensors that reached each parameter fill it, and only ``unused`` (and shared embeddings) stay empty."""
    expected = parameters(config)
    for name, parts in loaded.items():
        assert name in expected, f"{name} is no parameter"
        assert {part for part in name.split(".")[:-1] if not part.isdigit() and part != "model"} <= names, name
        assert [sum(part.shape[0] for part in parts), *parts[0].shape[1:]] == expected[name], name
    empty = set(expected) - set(loaded) - {"model.embed_tokens.weight"}
    later = range(1, config["num_hidden_layers"])
    assert empty == {f"model.layers.{layer}.{unused}.weight" for layer in later}


def drafters(form: str):
    """Drafters of every combination of features that ``form`` can express."""
    axes = [
        ("D = V",),
        ("2 layers",),
        ("Qwen3 style (norms on q and k)",),
        ("4 taps",),
        ("fc_norm", "norm_before_fc"),
        ("narrower than the target", "the target's embeddings"),
    ]
    for choice in itertools.product(*((None, *axis) for axis in axes)):
        drafter = build(*(feature for feature in choice if feature))
        if not refusals(drafter.config, form):
            yield drafter


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["vllm", "speculators"])
def test_vllms_loader_takes_every_exported_tensor(wheels, form):
    folder = "vllm/model_executor/models/"
    registry = ast.walk(ast.parse(source_of(wheels["vllm"], folder + "registry.py")))
    known = {}
    for node in registry:
        if isinstance(node, ast.Dict):
            pairs = [(k.value, v) for k, v in zip(node.keys, node.values) if isinstance(k, ast.Constant)]
            known |= {key: ast.literal_eval(value) for key, value in pairs if isinstance(value, ast.Tuple)}
    bases = [source_of(wheels["vllm"], f"{folder}{name}.py") for name in ("llama", "qwen2", "qwen3")]
    algorithms = {}
    exec(source_of(wheels["vllm"], "vllm/transformers_utils/configs/speculators/algos.py"), algorithms)
    for drafter in drafters(form):
        config, tensors = export(drafter, form)
        if form == "speculators":  # vLLM flattens it by itself
            layer = config["transformer_layer_config"]
            algorithms["SUPPORTED_SPECULATORS_TYPES"]["eagle3"](config, layer)
            config = layer
        (module, name) = known[config["architectures"][0]]
        text = source_of(wheels["vllm"], f"{folder}{module}.py")
        loaded = run_vllm_loader(text, name, drafter, tensors)
        ids = loaded.pop("draft_id_to_target_id", None)
        assert (ids is None) == (config["draft_vocab_size"] == V)
        assert_fills(config, loaded, "hidden_norm", attributes(text, *bases))


def run_vllm_loader(text: str, name: str, drafter: PPOWDrafter, tensors: dict) -> dict[str, list[torch.Tensor]]:
    """Parameter -> the tensors that its load_weights, and the stacking map in the same file, send there."""
    given, model = [], types.SimpleNamespace(use_aux_hidden_state=True, norm_before_fc=drafter.config.norm_before_fc)
    world = {
        "process_eagle_weight": lambda model, name: None,
        "WeightsMapper": lambda orig_to_new_substr: orig_to_new_substr,
        "AutoWeightsLoader": lambda self: types.SimpleNamespace(
            load_weights=lambda weights, mapper: given.extend(
                (name, tensor) for name, tensor in weights if not any(part in name for part in mapper)
            )
        ),
    }
    loader_of(text, name, world)(types.SimpleNamespace(model=model, use_parallel_drafting=False), tensors.items())
    call = next(
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and any(keyword.arg == "orig_to_new_stacked" for keyword in node.keywords)
    )
    maps = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    loaded = {}
    for target, tensor in given:
        for old, new in maps["orig_to_new_substr"].items():
            target = target.replace(old, new)
        for old, (new, _) in maps["orig_to_new_stacked"].items():
            target = target.replace(f"{old}.", f"{new}.")
        loaded.setdefault(target, []).append(tensor)
    assert sum(map(len, loaded.values())) == len(tensors) - ("t2d" in tensors)
    return loaded


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sglangs_loader_takes_every_exported_tensor(wheels):
    folder = "sglang/srt/models/"
    text, base = (source_of(wheels["sglang"], f"{folder}{name}.py") for name in ("llama_eagle3", "llama"))
    name = class_of(text, "LlamaForCausalLMEagle3").name
    load = loader_of(text, name, {"default_weight_loader": None})
    for drafter in drafters("sglang"):
        config, tensors = export(drafter, "sglang")
        assert config["architectures"] == [name] and config["tie_word_embeddings"] is False
        loaded = {}

        def parameter(name, loaded=loaded):
            def take(parameter, tensor, shard=None):
                loaded.setdefault(name, []).append(tensor)

            return types.SimpleNamespace(weight_loader=take)

        known = [(name, parameter(name)) for name in parameters(config)]
        model = types.SimpleNamespace(named_parameters=lambda known=known: known, hot_token_id=None)
        load(model, tensors.items())
        assert_fills(config, loaded, "input_layernorm", attributes(text, base))
        maps = {"d2t", "t2d"} & tensors.keys()
        assert sum(map(len, loaded.values())) == len(tensors) - len(maps)  # it drops unknown ones silently
        if drafter.pruned:
            assert torch.equal(model.hot_token_id, drafter.draft_columns())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "features",
    [
        ("the target's embeddings",),
        ("the target's embeddings", "D = V", "norm_before_fc"),
        ("the target's embeddings", "2 layers", "norm_output"),
        ("the target's embeddings", "4 taps", "fc_norm"),
        ("the target's embeddings", "heads of another size than hidden_size / heads", "RoPE of type llama3"),
        ("narrower than the target", "3 other taps"),
    ],
)
def test_sglangs_drafter_class_computes_the_same_logits(wheels, features):
    drafter = scaled(*features)
    config, tensors = export(drafter, "sglang")
    sources = (source_of(wheels["sglang"], f"sglang/srt/models/{name}.py") for name in ("llama", "llama_eagle3"))
    theirs = SGLang(*sources, config, tensors, EMBEDDINGS)
    text, taps = inputs(drafter, batch=1)
    drafted = torch.randint(1, V, (1, STEPS))
    with torch.no_grad():
        unrolled = Unrolled(drafter, embed(drafter), text, taps)
        found = [drafter.logits(unrolled.begin(torch.full((1, 1), text.shape[1] - 2)))]
        found += [drafter.logits(unrolled.advance(tokens)) for tokens in drafted.split(1, dim=1)]
    assert_close(
        [logits[0] for logits in found], [logits[None] for logits in theirs.chain(text[0], taps[0, :-1], drafted[0])]
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_options_of_the_serving_commands_exist(wheels):
    vllm = ast.walk(class_of(source_of(wheels["vllm"], "vllm/config/speculative.py"), "SpeculativeConfig"))
    fields = {node.target.id for node in vllm if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assert {"method", "model", "num_speculative_tokens"} <= fields
    text = "".join(
        source_of(wheels["sglang"], name)
        for name in wheels["sglang"].namelist()
        if name.startswith(("sglang/srt/server_args", "sglang/srt/arg_groups/")) and name.endswith(".py")
    )
    steps = ("algorithm", "draft_model_path", "num_steps", "eagle_topk", "num_draft_tokens")
    for option in ("model_path", *(f"speculative_{name}" for name in steps)):
        assert f"{option}:" in text, option
