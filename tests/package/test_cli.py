import importlib
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ppow import __version__
from ppow.training import cli, config
from ppow.training.stopping import deferred_sigterm

SCRIPT = Path(sys.executable).parent / "ppow"


@pytest.fixture
def toy_command(monkeypatch):
    """``demo``, run by a module that records its configuration and raises what it is told to."""
    module = types.ModuleType("ppow.training._toy")
    module.seen, module.error = [], None

    def main(config):
        module.seen.append(config)
        if module.error:
            raise module.error

    module.main = main
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "demo", cli.COMMANDS["demo"]._replace(module="._toy"))
    return module


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(argv, capsys):
    assert cli.main(argv) == 0
    page = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name}" in page and command.help in page


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ppow {__version__}\n"


def test_a_command_gets_its_configuration(toy_command):
    assert cli.main(["demo", "--max-new-tokens", "5"]) == 0
    assert [config.max_new_tokens for config in toy_command.seen] == [5]


def test_arguments_come_from_the_process_by_default(toy_command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppow", "demo", "--seed", "3"])
    assert cli.main() == 0
    assert toy_command.seen[0].seed == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["supervise"], "no command 'supervise'; the nearest is 'supervised'"),
        (["--tarket", "t"], "no command '--tarket'"),
        (
            ["demo", "--max-new-token", "5"],
            "demo has no option --max-new-token; the nearest is --max-new-tokens: tokens per answer",
        ),
        (["supervised", "--target", "t"], "supervised needs --data"),
        (["demo", "--config", "missing.json"], "--config missing.json cannot be read: No such file or directory"),
    ],
)
def test_a_user_error_is_one_line_and_status_2(argv, message, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ppow: error: ") and message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("bad mask"), OSError(28, "No space left on device", "x")])
def test_errors_of_a_command_are_reported_without_traceback(toy_command, error, capsys):
    toy_command.error = error
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == f"ppow: error: {error}\n"


def test_weights_that_cannot_be_written_and_interruptions_say_so_in_a_line(toy_command, capsys):
    toy_command.error = SafetensorError("No space left on device")  # its word for a full disk
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "ppow: error: safetensors could not read or write: No space left on device\n"
    toy_command.error = KeyboardInterrupt()
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\nppow: interrupted; nothing half-written was left behind\n"


def test_sigterm_ends_a_command_with_its_cleanup_and_status_143(toy_command, capsys):
    cleaned = []

    def main(config):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # a second one does not break the cleanup off
            cleaned.append(config)

    toy_command.main, before = main, signal.getsignal(signal.SIGTERM)
    assert cli.main(["demo"]) == 143 and len(cleaned) == 1
    assert capsys.readouterr().err == "\nppow: stopped by SIGTERM; nothing half-written was left behind\n"
    assert signal.getsignal(signal.SIGTERM) is before
    with deferred_sigterm() as asked:
        assert not asked()  # what is run next in this process


def test_the_traceback_is_one_variable_away(toy_command, monkeypatch):
    monkeypatch.setenv("PPOW_DEBUG", "1")
    toy_command.error = ValueError("bad mask")
    with pytest.raises(ValueError, match="bad mask"):
        cli.main(["demo"])


def test_our_own_mistakes_keep_their_traceback(toy_command):
    toy_command.error = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_of_the_table_exists(name):
    command = cli.COMMANDS[name]
    assert getattr(config, command.config).command() == name
    assert callable(importlib.import_module(command.module, "ppow.training").main)


LISTED = """
import sys
try:
    from ppow.training.cli import main
    main(sys.argv[1:])
finally:
    print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("argv", [["--help"], ["supervised", "--help"], ["demo", "--help"]])
def test_help_answers_at_once(argv):
    """It loads no package but ours and safetensors, which is small: importing torch alone takes seconds."""
    done = subprocess.run([sys.executable, "-c", LISTED, *argv], capture_output=True, text=True)
    assert "usage: ppow" in done.stdout
    assert subprocess.run([SCRIPT, *argv], capture_output=True, text=True).stdout == done.stdout
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    plain = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True)
    before = {name.partition(".")[0] for name in plain.stdout.split()}  # what the environment loads on its own
    assert "ppow" in loaded and loaded - before - {"ppow", "safetensors"} <= sys.stdlib_module_names


def test_the_module_form_works_for_launchers():
    environment = {**os.environ, "PPOW_DEBUG": "0"}
    command = [sys.executable, "-m", "ppow.training.cli", "demo", "--limit", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "ppow: error: limit must be an integer >= 1, or none, got 0 (prompts to run; none: all).\n"
