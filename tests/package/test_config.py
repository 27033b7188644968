import dataclasses
import json
import re
import subprocess
import sys
from typing import Literal

import pytest

from ppow.training import config as configs
from ppow.training.arguments import Config, option
from ppow.training.config import (
    DemoConfig,
    EvaluateConfig,
    RegenerateConfig,
    ReinforceConfig,
    SupervisedConfig,
    TrainConfig,
)

ALL = [SupervisedConfig, ReinforceConfig, RegenerateConfig, EvaluateConfig, DemoConfig, TrainConfig]
STAGE1 = ["--target", "org/t", "--data", "d.jsonl", "--output-dir", "out"]
STAGE2 = [*STAGE1, "--drafter", "dr"]
PUBLISHED = [*STAGE2, "--preset", "published"]
EVALUATE = ["--target", "t", "--drafter", "d", "--output-dir", "o"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    """One field of each kind."""

    name: str = option("a name")
    count: int = option("how many", 3, at_least=1)
    rate: float = option("how fast", 0.5, above=0, below=1)
    wide: bool = option("how wide", False)
    mode: Literal["greedy", "sampling"] = option("which way", "greedy")
    ids: list[int] | None = option("which ones", None, at_least=0)
    words: list[str] = option("more", ["a", "b"])
    more: dict = option("even more", {})


def toy(*argv):
    return ToyConfig.from_args(["--name", "x", *argv])


def test_every_kind_of_value_is_read():
    argv = ["--count", "5", "--rate=0.25", "--wide", "--mode", "sampling", "--ids", "1,2", "--words", "c"]
    argv += ["--more", '{"a": 1}']
    assert toy(*argv).argv() == [
        *("ppow", "toy", "--name=x", "--count=5", "--rate=0.25", "--wide", "--mode=sampling", "--ids=1,2", "--words=c"),
        '--more={"a": 1}',
    ]
    assert ToyConfig.from_args(toy(*argv).argv()[2:]) == toy(*argv) and toy().argv() == ["ppow", "toy", "--name=x"]
    assert toy(*argv).to_dict() == {
        "name": "x",
        "count": 5,
        "rate": 0.25,
        "wide": True,
        "mode": "sampling",
        "ids": [1, 2],
        "words": ["c"],
        "more": {"a": 1},
    }


def test_defaults_hold_and_list_defaults_are_not_shared():
    first, second = toy(), toy()
    assert (first.count, first.rate, first.wide, first.mode, first.ids, first.words) == (
        3,
        0.5,
        False,
        "greedy",
        None,
        ["a", "b"],
    )
    assert first.words is not second.words


@pytest.mark.parametrize("argv", [["--ids", "1,2,3"], ["--ids", "1", "--ids", "2,3"], ["--ids=1", "--ids", "2, 3"]])
def test_lists_are_comma_separated_or_repeated(argv):
    assert toy(*argv).ids == [1, 2, 3]


@pytest.mark.parametrize(
    ("argv", "wide"),
    [(["--wide"], True), (["--wide=True"], True), (["--wide=false"], False), (["--wide", "--no-wide"], False)],
)
def test_switches(argv, wide):
    assert toy(*argv).wide is wide


def test_dashes_and_underscores_name_the_same_option():
    dashed = SupervisedConfig.from_args([*STAGE1, "--max-length", "64", "--no-resume"])
    scored = SupervisedConfig.from_args([*STAGE1, "--max_length", "64", "--no_resume"])
    assert dashed == scored and dashed.max_length == 64 and dashed.resume is False


def test_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "toy.json"
    path.write_text(json.dumps({"name": "file", "count": 7, "wide": True, "ids": [4], "rate": 0.75}))
    config = ToyConfig.from_args(["--count", "8", "--config", str(path), "--no-wide", "--ids", "5"])
    assert (config.name, config.count, config.wide, config.ids, config.rate) == ("file", 8, False, [5], 0.75)
    assert ToyConfig.from_args(["--config", str(path), "--ids", "none"]).ids is None


@pytest.mark.parametrize("config_class", ALL)
def test_to_dict_survives_json(config_class):
    required = dict.fromkeys(config_class._required(), "x")
    extra = {RegenerateConfig: {"target": "t"}, EvaluateConfig: {"target": "t", "drafter": "d"}}
    required |= extra.get(config_class, {})
    config = config_class.from_dict(required)
    assert config_class.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("config_class", ALL)
def test_help_names_every_field_with_its_help(config_class, capsys):
    with pytest.raises(SystemExit) as stop:
        config_class.from_args(["--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert page.startswith(f"usage: ppow {config_class.command()} ")
    for field in dataclasses.fields(config_class):
        assert field.metadata["help"] in page, field.name
        assert field.name.replace("_", "-") in page


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        toy().count = 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cuont", "4"], "no option --cuont; the nearest is --count: how many"),
        (["--no-count"], "no option --no-count; the nearest is --count: how many"),
        (["--count"], "--count needs a value: an integer >= 1"),
        (["--count", "--wide"], "--count needs a value: an integer >= 1"),
        (["--count", "many"], "--count must be an integer >= 1, got 'many'"),
        (["--count", "1.5"], "--count must be an integer >= 1, got '1.5'"),
        (["--count", "0"], "count must be an integer >= 1, got 0"),
        (["--count", "-1"], "count must be an integer >= 1, got -1"),
        (["--rate", "0"], "rate must be a number > 0 and < 1, got 0.0"),
        (["--rate", "1"], "rate must be a number > 0 and < 1, got 1.0"),
        (["--rate", "nan"], "rate must be a number > 0 and < 1, got nan"),
        (["--wide=yes"], "--wide is a switch: write --wide or its --no- form"),
        (["--no-wide=true"], "--wide is a switch: write --wide or its --no- form"),
        (["--wide", "true"], "unexpected argument 'true'"),
        (["--mode", "gredy"], "mode must be one of greedy, sampling, got 'gredy'"),
        (["--ids", "1,x"], "--ids must be a comma separated list, each an integer >= 0, or none, got '1,x'"),
        (["--ids", "1,-2"], "ids must be a comma separated list, each an integer >= 0, or none, got \\[1, -2\\]"),
        (["--name", ""], "name must be a text, got ''"),
        (["stray"], "unexpected argument 'stray'"),
        (["-count", "3"], "no option -count; the nearest is --count"),
        (["--config"], "--config needs a value: a JSON file"),
    ],
)
def test_bad_arguments_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        toy(*argv)


def test_names_of_other_trainers_are_understood_or_answered():
    given = ["--lr", "3e-5", "--bs=2", "--max_steps", "7", "--output", "out", *STAGE1[:4]]
    config = SupervisedConfig.from_args(given)
    assert (config.learning_rate, config.batch_size, config.steps, config.output_dir) == (3e-5, 2, 7, "out")
    for key, option_here in [("epochs", "steps"), ("model", "target"), ("learning-rat", "learning-rate")]:
        with pytest.raises(ValueError, match=f"no option --{key}; the nearest is --{option_here}: "):
            SupervisedConfig.from_args([*STAGE1, f"--{key}", "3"])
    # a command's own option is never taken for another's
    own = ["--data", "d", "--endpoint", "http://e", "--model", "m", "--output", "o.jsonl"]
    assert (RegenerateConfig.from_args(own).output, RegenerateConfig.from_args(own).model) == ("o.jsonl", "m")
    with pytest.raises(ValueError, match="demo has no option --lr; the nearest is --"):
        DemoConfig.from_args(["--lr", "1"])


def test_a_missing_required_option_is_named():
    with pytest.raises(ValueError, match="toy needs --name: a name"):
        ToyConfig.from_args([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object of options, got list"),
        ('{"cuont": 3}', "no key 'cuont'; the nearest is 'count'"),
        ('{"name": "x", "count": 1.5}', "count must be an integer >= 1, got 1.5"),
        ('{"name": "x", "count": true}', "count must be an integer >= 1, got True"),
        ('{"name": "x", "count": null}', "count must be an integer >= 1, got None"),
        ('{"name": "x", "wide": 1}', "wide must be true or false, got 1"),
        ('{"name": "x", "ids": 3}', "ids must be a comma separated list"),
        ('{"name": "x", "rate": "fast"}', "rate must be a number > 0 and < 1, got 'fast'"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        ToyConfig.from_args(["--config", str(path)])


def test_whole_numbers_serve_where_floats_are_meant(tmp_path):
    config = EvaluateConfig(target="t", drafter="d", output_dir="o", temperatures=(0, 0.5))
    assert config.temperatures == [0.0, 0.5] and type(config.temperatures[0]) is float


@pytest.mark.parametrize(
    ("config_class", "argv", "message"),
    [
        (SupervisedConfig, [*STAGE1, "--steps", "0"], "steps must be an integer >= 1"),
        (SupervisedConfig, [*STAGE1, "--learning-rate", "0"], "learning_rate must be a number > 0"),
        (SupervisedConfig, [*STAGE1, "--steps", "10", "--warmup-steps", "10"], "warmup_steps=10 must be smaller"),
        (SupervisedConfig, [*STAGE1, "--step-weight", "1.5"], "step_weight must be a number > 0 and <= 1"),
        (SupervisedConfig, [*STAGE1, "--dtype", "float16"], "dtype must be one of float32, bfloat16"),
        (ReinforceConfig, STAGE1, "reinforce needs --drafter"),
        (ReinforceConfig, [*STAGE2, "--window-size", "0"], "window_size must be an integer >= 1"),
        (ReinforceConfig, [*STAGE2, "--group-size", "1"], "group_size must be an integer >= 2"),
        (ReinforceConfig, [*STAGE2, "--verification", "exact"], "verification must be one of text, greedy, sampling"),
        (ReinforceConfig, [*STAGE2, "--adaptive-switch", "1.1"], "adaptive_switch must be a number >= 0 and <= 1"),
        (ReinforceConfig, [*PUBLISHED, "--max-forest-nodes", "79"], "raise it to 80 or more"),
        (ReinforceConfig, [*PUBLISHED, "--proximity-bonus", "0.9"], "must stay below 0.893"),
        (SupervisedConfig, [*STAGE1, "--drafter", "d", "--taps", "1,2,3"], "taps shape a fresh drafter"),
        (EvaluateConfig, [*EVALUATE, "--draft-threshold", "1"], "draft_threshold must be a number >= 0 and < 1"),
        (RegenerateConfig, ["--data", "d", "--output", "o"], "either --target or --endpoint"),
        (
            RegenerateConfig,
            ["--data", "d", "--output", "o", "--target", "t", "--endpoint", "http://h/v1"],
            "either --target or --endpoint",
        ),
        (RegenerateConfig, ["--data", "d", "--output", "o", "--endpoint", "h:80"], "endpoint must be a URL"),
        (RegenerateConfig, ["--data", "d", "--output", "o", "--endpoint", "http://h/v1"], "name the model"),
        (EvaluateConfig, [*EVALUATE, "--temperatures", "0,-1"], "temperatures must be"),
        (EvaluateConfig, [*EVALUATE, "--prompts", ","], "must not be empty"),
        (EvaluateConfig, [*EVALUATE, "--tree-depth", "5"], "A tree needs tree_depth, tree_top_k and tree_nodes"),
        (
            EvaluateConfig,
            [*EVALUATE, "--window-size", "4", "--tree-depth", "5", "--tree-top-k", "3", "--tree-nodes", "20"],
            "give one of both",
        ),
        (DemoConfig, ["--target", "t"], "give both or neither"),
        (DemoConfig, ["--window-size", "0"], "window_size must be an integer >= 1"),
    ],
)
def test_impossible_plans_are_refused(config_class, argv, message):
    with pytest.raises(ValueError, match=message):
        config_class.from_args(argv)


def test_the_defaults_that_the_paper_gives():
    config = ReinforceConfig.from_args(STAGE2)
    assert (config.window_size, config.group_size, config.cost_ratio) == (10, 8, 0.12)
    stage1 = SupervisedConfig.from_args(STAGE1)
    assert (stage1.ttt_steps, stage1.step_weight) == (7, 0.8)
    assert EvaluateConfig.from_args(EVALUATE).temperatures == [0.0, 1.0]


def test_a_preset_gives_the_options_that_are_not_given(tmp_path):
    assert ReinforceConfig.from_args(STAGE2) == ReinforceConfig.from_args([*STAGE2, "--preset", "ppow"])
    published = ReinforceConfig.from_args([*STAGE2, "--preset", "published"])
    assert (published.objective, published.estimator, published.verification) == ("ppow", "rollout", "greedy")
    assert (published.kl_coef, published.supervised_coef, published.learning_rate) == (0.1, 0.0, 5e-5)
    for name in ("cst", "lk"):
        control = ReinforceConfig.from_args([*STAGE2, f"--preset={name}"])
        assert (control.objective, control.supervised_coef, control.learning_rate) == (name, 0.0, 3e-4)
    given = ["--kl-coef", "0.3", "--preset", "published", "--learning-rate", "1e-3"]
    mine = ReinforceConfig.from_args([*STAGE2, *given])
    assert mine == dataclasses.replace(published, kl_coef=0.3, learning_rate=1e-3)
    (tmp_path / "file.json").write_text('{"preset": "published", "kl_coef": 0.3}')
    from_file = ReinforceConfig.from_args([*STAGE2, "--config", str(tmp_path / "file.json"), "--lr", "1e-3"])
    assert from_file == mine
    whole = ReinforceConfig.from_args(STAGE2).to_dict()  # a preset on the command line is above the file's values
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    assert ReinforceConfig.from_args(["--config", str(tmp_path / "whole.json"), "--preset", "published"]) == published
    with pytest.raises(ValueError, match=r"preset must be one of ppow, published, cst, lk, head, got \['ppow'\]"):
        ReinforceConfig.from_dict({**whole, "preset": ["ppow"]})
    with pytest.raises(ValueError, match="the nearest is --preset"):
        ReinforceConfig.from_args([*STAGE2, "--presets", "published"])
    assert ReinforceConfig.from_dict(published.to_dict()) == published  # the record holds what was taken


def test_the_first_preset_is_what_the_options_say_without_one():
    name, values = next(iter(configs.PRESETS.items()))
    assert name == "ppow"
    config = ReinforceConfig.from_args(STAGE2)
    assert {key: getattr(config, key) for key in values} == values


def test_help_shows_presets_in_full_and_groups():
    page = ReinforceConfig.help()
    unwrapped = " ".join(page.split())
    for name, values in configs.PRESETS.items():
        flags = {f"--{key.replace('_', '-')}": value for key, value in values.items()}
        shown = " ".join(flag if value is True else f"{flag} {value}" for flag, value in flags.items())
        assert f"{name}: {shown}" in unwrapped
    assert re.findall(r"^(\w[^:]*):$", page, re.MULTILINE) == [
        "basics",
        "data",
        "method",
        "resources",
        "only with --estimator rollout",
    ]
    with pytest.raises(ValueError, match="preset must be one of ppow, published, cst, lk, head, got 'best'"):
        ReinforceConfig.from_args([*STAGE2, "--preset", "best"])
    with pytest.raises(ValueError, match="supervised has no option --preset"):
        SupervisedConfig.from_args([*STAGE1, "--preset", "ppow"])


@pytest.mark.parametrize(
    ("argv", "graphs"),
    [([], None), (["--cuda-graphs"], True), (["--no-cuda-graphs"], False), (["--cuda-graphs=none"], None)],
)
def test_switches_that_may_be_left_open(argv, graphs):
    assert DemoConfig.from_args(argv).cuda_graphs is graphs
    with pytest.raises(ValueError, match="is a switch"):
        DemoConfig.from_args(["--cuda-graphs=maybe"])


def test_every_default_of_stage_2_says_whose_choice_it_is():
    shared = {field.name for field in dataclasses.fields(configs.StageConfig)} - {"steps", "learning_rate"}
    for field in dataclasses.fields(ReinforceConfig):
        if field.name not in shared | {"drafter", "objective"}:
            assert "(paper)" in field.metadata["help"] or "(ours)" in field.metadata["help"], field.name


def test_reading_options_imports_nothing_heavy():
    code = (
        "import sys; from ppow.training.config import DemoConfig; DemoConfig.from_args([]); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        (configs.EvaluateConfig, ["basics", "how to draft", "resources", "what to measure"]),
        (DemoConfig, ["basics", "how to draft", "resources"]),
        (
            configs.RegenerateConfig,
            ["basics", "a server that answers (OpenAI's protocol)", "data", "answers", "resources"],
        ),
        (configs.PushConfig, ["basics", "what the card says", "repository", "Space"]),
    ],
)
def test_long_help_is_grouped_and_begins_with_what_is_needed(kind, groups):
    page = kind.help()
    assert re.findall(r"^(\w[^:\n]*):$", page, re.MULTILINE) == groups
    first = page[page.index("basics:") : page.index(f"{groups[1]}:")]
    assert all(f"--{name.replace('_', '-')}\n" in first for name in kind._required())
