"""How a configuration dataclass becomes a command line: parsing, checking and help, derived from its fields.

Fields are declared with :func:`option`. Supported types: ``str``, ``int``, ``float``, ``bool``, ``Literal`` of strings,
``list`` of the scalars, any of them ``| None``, and ``dict``, an object of JSON. Nothing here imports torch, so that
``ppow --help`` stays fast.
"""

import dataclasses
import difflib
import inspect
import json
import math
import textwrap
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

C = TypeVar("C", bound="Config")

# What other trainers call an option -> what it is here, if the command has it: the same in all but the name ...
_SYNONYMS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    **dict.fromkeys(("bs", "per_device_train_batch_size", "micro_batch_size"), "batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), "accumulation"),
    **dict.fromkeys(("max_steps", "num_steps"), "steps"),
    **dict.fromkeys(("max_seq_length", "max_seq_len"), "max_length"),
    **dict.fromkeys(("out", "out_dir", "output"), "output_dir"),
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "save_total_limit": "keep_last",
    "report_to": "trackers",
    "hub_model_id": "push_to_hub",
    "max_tokens": "max_new_tokens",
}
# ... or only near: named in the answer, not taken
_RELATED = {
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), "steps"),
    **dict.fromkeys(("model", "model_name_or_path", "base_model", "target_model", "verifier"), "target"),
    **dict.fromkeys(("draft", "draft_model", "assistant_model", "speculative_model"), "drafter"),
    **dict.fromkeys(("dataset", "dataset_name", "train_file", "train_data", "train_data_path", "prompts"), "data"),
    **dict.fromkeys(("bf16", "fp16", "precision", "torch_dtype"), "dtype"),
    **dict.fromkeys(("resume_from_checkpoint", "continue"), "resume"),
    **dict.fromkeys(("k", "gamma", "num_speculative_tokens", "num_assistant_tokens"), "window_size"),
    **dict.fromkeys(("warmup_ratio", "warmup"), "warmup_steps"),
    "output_dir": "output",
    "temperature": "temperatures",
    "lr_scheduler_type": "average_from",
}
_SCALARS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "an object of JSON"}


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    group: str | None = None,
) -> Any:
    """A dataclass field with its help text and, for numbers (or each number of a list), its bounds.

    ``group`` heads this and the following fields in ``--help``, up to the next one that names a group.
    """
    bounds = {">=": at_least, ">": above, "<=": at_most, "<": below}
    given = {sign: bound for sign, bound in bounds.items() if bound is not None}
    metadata = {"help": help, "bounds": given, "group": group}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every command's configuration: checked when made, readable from argv, a dict or a JSON file."""

    _positional: ClassVar[str | None] = None  # name of the field that may also be given without its --key
    presets: ClassVar[dict[str, dict]] = {}  # name -> values that --preset gives to options that are not given

    @classmethod
    def command(cls) -> str:
        """The name on the command line: ``SupervisedConfig`` -> ``supervised``."""
        return cls.__name__.removesuffix("Config").lower()

    @classmethod
    def program(cls) -> str:
        """What its command line begins with."""
        return f"ppow {cls.command()}"

    @classmethod
    def from_args(cls: type[C], argv: Sequence[str]) -> C:
        """Read ``--key value`` arguments.

        One field, ``_positional``, may come without its key. Keys take dashes or underscores; booleans are ``--key`` /
        ``--no-key`` (or ``--key=true``); lists are comma separated or repeated; ``none`` unsets an optional field.
        ``--config file.json`` gives values that the other arguments override, and ``--help`` prints the fields and
        exits. What other trainers call an option (``--lr``) is understood.

        Raises:
            ValueError: unknown or missing key, missing value, a value of the wrong type or out of bounds.
        """
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        given: dict[str, Any] = {}
        rest = list(argv)
        while rest:
            token = rest.pop(0)
            if token in ("-h", "--help"):
                print(cls.help())
                raise SystemExit(0)
            if token.startswith("-") and not token.startswith("--"):
                raise ValueError(cls._unknown(token[1:].partition("=")[0].replace("-", "_"), f"option {token}"))
            if not token.startswith("--") and cls._positional and cls._positional not in given:
                given[cls._positional] = token
                continue
            if not token.startswith("--"):
                raise ValueError(f"{cls.command()}: unexpected argument {token!r}; options are written --key value.")
            name, has_value, text = token[2:].partition("=")
            key = cls._meant(name.replace("-", "_"))
            negated = key.removeprefix("no_")
            switch = key if key in hints else negated
            if switch in hints and _plain(hints[switch]) is bool:
                words = {"true": True, "false": False} | ({"none": None} if _optional(hints[switch]) else {})
                if has_value and (key != switch or text.lower() not in words):
                    raise ValueError(f"--{_dashes(switch)} is a switch: write --{_dashes(switch)} or its --no- form.")
                given[switch] = words[text.lower()] if has_value else key == switch
                continue
            if key not in {"config", *cls._keys()}:
                raise ValueError(cls._unknown(key, f"option --{name}"))
            if not has_value:
                if not rest or rest[0].startswith("--"):
                    wanted = "a JSON file" if key == "config" else cls._expected(key)
                    raise ValueError(f"--{name} needs a value: {wanted}.")
                text = rest.pop(0)
            if key == "config":
                values.update(cls._read_file(Path(text)))
            elif key == "preset":
                given[key] = text
            elif _list_item(hints[key]) and isinstance(given.get(key), list):
                given[key] = given[key] + cls._parse(key, hints[key], text)
            else:
                given[key] = cls._parse(key, hints[key], text)
        if "preset" in given:  # above the file, below the other arguments
            values = {**values, **cls._preset(given.pop("preset"))}
        return cls.from_dict({**values, **given})

    @classmethod
    def from_dict(cls: type[C], values: dict) -> C:
        """Build from plain values, ``preset`` among them. Raises ValueError for unknown or missing keys, bad values."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in cls._keys():
                raise ValueError(cls._unknown(key, f"key {key!r}"))
        if "preset" in values:
            values = {**cls._preset(values["preset"]), **values}
            del values["preset"]
        for name in cls._required():
            if name not in values:
                raise ValueError(f"{cls.command()} needs --{_dashes(name)}: {fields[name].metadata['help']}.")
        return cls(**values)

    def to_dict(self, without: Collection[str] = ()) -> dict:
        """Plain values, ready for JSON; of all options ``from_dict`` gives the same configuration back."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in without}

    def argv(self) -> list[str]:
        """The command line that gives this configuration: its program, and the options that are not the default."""
        words = self.program().split()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == _default(field):
                continue
            name = _dashes(field.name)
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                text = json.dumps(value) if isinstance(value, dict) else _show(value)
                words.append(f"--{name}={text}")
        return words

    @classmethod
    def help(cls) -> str:
        """The page that ``--help`` prints."""
        required = " ".join(
            name.upper() if name == cls._positional else f"--{_dashes(name)} {name.upper()}" for name in cls._required()
        )
        lines = [
            f"usage: {cls.program()} {required} [options]".replace("  ", " "),
            "",
            inspect.cleandoc(cls.__doc__ or ""),
            "",
        ]
        groups: dict[str | None, list[str]] = {}
        group = None
        for field in dataclasses.fields(cls):
            group = field.metadata["group"] or group
            default = "required" if field.name in cls._required() else f"default {_show(_default(field))}"
            hint = typing.get_type_hints(cls)[field.name]
            flag = f"--[no-]{_dashes(field.name)}" if _plain(hint) is bool else f"--{_dashes(field.name)}"
            text = f"{field.metadata['help']} ({cls._expected(field.name)}; {default})"
            groups.setdefault(group, []).extend([f"  {flag}", *_wrapped(text)])
        if cls.presets:
            named = groups.get("basics") or next(iter(groups.values()))
            known = f"{cls._expected('preset')}; default {next(iter(cls.presets))}"
            named += ["  --preset", *_wrapped(f"a named set of values for the options that you do not give ({known})")]
            for name, values in cls.presets.items():
                given = " ".join(
                    f"--{_dashes(k)}" if v is True else f"--{_dashes(k)} {_show(v)}" for k, v in values.items()
                )
                named += _wrapped(f"{name}: {given}")
        for group in sorted(groups, key=lambda name: name != "basics"):
            found = groups[group]
            lines += [*([f"{group}:"] if group else []), *found]
        lines += ["  --config", *_wrapped("JSON file with any of these options; the command line overrides it")]
        return "\n".join(lines)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _coerce(hints[field.name], getattr(self, field.name))
            if not _fits(hints[field.name], field.metadata["bounds"], value):
                raise ValueError(
                    f"{field.name} must be {self._expected(field.name)}, got {value!r} ({field.metadata['help']})."
                )
            object.__setattr__(self, field.name, value)

    # -- reading ---------------------------------------------------------------------------------------------------

    @classmethod
    def _keys(cls) -> list[str]:
        return [*(field.name for field in dataclasses.fields(cls)), *(["preset"] if cls.presets else [])]

    @classmethod
    def _preset(cls, name: object) -> dict:
        if not isinstance(name, str) or name not in cls.presets:
            raise ValueError(f"preset must be {cls._expected('preset')}, got {name!r}.")
        return cls.presets[name]

    @classmethod
    def _required(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls) if _default(field) is dataclasses.MISSING]

    @classmethod
    def _unknown(cls, key: str, what: str) -> str:
        fields = {field.name: field.metadata["help"] for field in dataclasses.fields(cls)}
        fields |= {"preset": "a named set of values for the options that you do not give"} if cls.presets else {}
        nearest = cls._nearest(key, list(fields))
        name = repr(nearest) if what.startswith("key") else f"--{_dashes(nearest)}"
        told = f"the nearest is {name}: {fields[nearest].partition(';')[0].partition(' (')[0]}"
        return f"{cls.command()} has no {what}; {told} ({cls.program()} --help)."

    @classmethod
    def _nearest(cls, key: str, known: list[str]) -> str:
        """The option that an unknown one comes nearest to: in meaning, as an abbreviation, or in letters."""
        key = key.lower()
        if (meant := _SYNONYMS.get(key, _RELATED.get(key))) in known:
            return meant
        short = [name for name in known if key == "".join(word[0] for word in name.split("_"))]
        begun = [name for name in known if key and name.startswith(key)]
        return [*short, *begun, *difflib.get_close_matches(key, known, n=1, cutoff=0.0)][0]

    @classmethod
    def _meant(cls, key: str) -> str:
        """``lr`` -> ``learning_rate``, where the command knows the latter alone."""
        known = {field.name for field in dataclasses.fields(cls)}
        meant = _SYNONYMS.get(key)
        return meant if key not in known and meant in known else key

    @classmethod
    def _parse(cls, key: str, hint: Any, text: str) -> Any:
        """Text from the command line -> a value of the field's type; the bounds are checked later, once for all."""
        if _optional(hint) and text.lower() == "none":
            return None
        item = _list_item(hint)
        scalar = _plain(item or hint)
        if scalar is dict:
            scalar = json.loads
        try:
            parts = [part.strip() for part in text.split(",") if part.strip()] if item else [text]
            parsed = [scalar(part) if scalar in (int, float, json.loads) else part for part in parts]
        except ValueError:
            raise ValueError(f"--{_dashes(key)} must be {cls._expected(key)}, got {text!r}.") from None
        return parsed if item else parsed[0]

    @classmethod
    def _read_file(cls, path: Path) -> dict:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--config {path} cannot be read: {error.strerror}.") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"--config {path} is not valid JSON: {error}.") from None
        if not isinstance(values, dict):
            raise ValueError(f"--config {path} must hold a JSON object of options, got {type(values).__name__}.")
        values = {key.replace("-", "_"): value for key, value in values.items()}
        for key in values:
            if key not in cls._keys():
                raise ValueError(f"{path}: {cls._unknown(key, f'key {key!r}')}")
        return values

    @classmethod
    def _expected(cls, name: str) -> str:
        """What a field takes, in words: ``an integer >= 1``."""
        if name == "preset":
            return "one of " + ", ".join(cls.presets)
        hint = typing.get_type_hints(cls)[name]
        bounds = next(field for field in dataclasses.fields(cls) if field.name == name).metadata["bounds"]
        item = _list_item(hint)
        plain = _plain(item or hint)
        words = _SCALARS.get(plain) or "one of " + ", ".join(typing.get_args(plain))
        limits = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items())
        words = f"{words} {limits}" if limits else words
        words = f"a comma separated list, each {words}" if item else words
        return f"{words}, or none" if _optional(hint) else words


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False)


def _dashes(name: str) -> str:
    return name.replace("_", "-")


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _show(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    if value == {}:
        return "empty"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union) and type(None) in typing.get_args(hint)


def _plain(hint: Any) -> Any:
    """``X | None`` -> ``X``."""
    return next(arg for arg in typing.get_args(hint) if arg is not type(None)) if _optional(hint) else hint


def _list_item(hint: Any) -> Any:
    """``list[X]`` (or ``list[X] | None``) -> ``X``; None for scalars."""
    plain = _plain(hint)
    return typing.get_args(plain)[0] if typing.get_origin(plain) is list else None


def _coerce(hint: Any, value: Any) -> Any:
    """Whole numbers where floats are meant (JSON has one kind of number), tuples where lists are meant."""
    item = _list_item(hint)
    if item and isinstance(value, (list, tuple)):
        return [_coerce(item, part) for part in value]
    return float(value) if _plain(hint) is float and type(value) is int else value


def _fits(hint: Any, bounds: dict, value: Any) -> bool:
    if value is None:
        return _optional(hint)
    item = _list_item(hint)
    if item:
        return isinstance(value, list) and all(_fits(item, bounds, part) for part in value)
    plain = _plain(hint)
    if typing.get_origin(plain) is Literal:
        return value in typing.get_args(plain)
    if type(value) is not plain or value == "" or (plain is float and not math.isfinite(value)):
        return False
    tests = {">=": value.__ge__, ">": value.__gt__, "<=": value.__le__, "<": value.__lt__} if bounds else {}
    return all(tests[sign](plain(bound)) for sign, bound in bounds.items())
