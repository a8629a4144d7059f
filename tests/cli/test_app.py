"""What holds for every command: help, imports, exit codes, streams, colours, broken pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import qlazy as package
from qlazy.cli.app import EXIT_CODES, ORDER, app, complain
from qlazy.errors import DoesNotFit, OutOfSpace, QlazyError, UsageError

HEAVY = ("torch", "transformers", "huggingface_hub", "bitsandbytes", "accelerate", "numpy")


def errors(kind=QlazyError):
    return [kind, *(e for child in kind.__subclasses__() for e in errors(child))]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [], *([name, "-h"] for name in ORDER), ["configs", "cp", "--help"]])
def test_help_is_on_stdout(qlazy, arguments):
    done = qlazy(*arguments)
    assert done.code == 0 and done.err == "" and "Usage: qlazy" in done.out
    assert "\x1b" not in done.out


def test_help_lists_commands_in_order_and_exit_codes(qlazy):
    out = qlazy("--help").out
    places = [out.index(f"│ {name} ") for name in ORDER]
    assert places == sorted(places)
    for code, meaning in EXIT_CODES.items():
        assert f"{code}  {meaning}" in out


def test_every_error_has_a_listed_exit_code():
    assert {e.exit_code for e in errors()} <= set(EXIT_CODES)


def test_version(qlazy):
    assert qlazy("--version").out == f"qlazy {package.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["plan", "--help"], ["plan", "TINY"], ["models"], ["configs", "ls"], ["run", "no-such-model-at-all", "x"]],
)
def test_light_commands_import_nothing_heavy(arguments, tiny, environment):
    arguments = [str(tiny) if a == "TINY" else a for a in arguments]
    code = (
        "import sys\nfrom qlazy.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    # Offline, a hub id is refused without asking; huggingface_hub may be what says so.
    allowed = "['huggingface_hub']" if arguments[0] == "run" else "[]"
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] in ("[]", allowed), done.stderr


def test_completion_names_aliases_without_torch(environment):
    code = (
        "import sys\nfrom qlazy.cli import app\n"
        "try:\n    app(prog_name='qlazy')\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    asked = {"_QLAZY_COMPLETE": "complete_bash", "COMP_WORDS": "qlazy plan llama-7", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment | asked, capture_output=True, text=True)
    assert done.stdout.split() == ["llama-70b"]
    assert done.stderr == "False\n"


def test_unknown_command_is_a_usage_error(qlazy):
    done = qlazy("plna", "x")
    assert done.code == 2 and done.out == ""
    assert "plna" in done.err and "plan" in done.err and "Hint: See qlazy --help." in done.err


def raising(monkeypatch, error):
    """Makes `qlazy models` fail."""

    def fail():
        raise error

    monkeypatch.setattr("qlazy.configs.aliases", fail)


@pytest.mark.parametrize("kind", errors())
def test_every_error_becomes_its_exit_code(qlazy, monkeypatch, kind):
    raising(monkeypatch, kind("It broke at [layer 3].", hint="Type [this]."))
    done = qlazy("models", "--json")
    assert done.code == kind.exit_code
    assert done.err == "Error: It broke at [layer 3].\nHint: Type [this].\n"
    error = done.json["error"]
    assert (error["type"], error["message"], error["hint"]) == (kind.__name__, "It broke at [layer 3].", "Type [this].")


def test_without_a_hint_there_is_no_hint_line(qlazy, monkeypatch):
    raising(monkeypatch, OutOfSpace("The disk is full."))
    assert qlazy("models").err == "Error: The disk is full.\n"


def test_unexpected_error_is_code_1_and_shows_its_traceback_only_when_asked(qlazy, monkeypatch):
    raising(monkeypatch, KeyError("layers"))
    done = qlazy("models", "--json")
    assert done.code == 1
    assert done.err == "Error: KeyError: 'layers'\nHint: Set QLAZY_DEBUG=1 to see the traceback.\n"
    assert done.json == {
        "schema": 1,
        "error": {"type": "KeyError", "message": "KeyError: 'layers'", "hint": "Set QLAZY_DEBUG=1 to see the traceback."},
    }
    assert "Traceback (most recent call last)" in qlazy("models", env={"QLAZY_DEBUG": "1"}).err


def test_interrupt_is_130(qlazy, monkeypatch):
    raising(monkeypatch, KeyboardInterrupt())
    done = qlazy("models")
    assert done.code == 130 and done.out == "" and done.err == "\nInterrupted.\n"


def test_numbers_of_does_not_fit_are_in_the_json(capsys):
    code = complain(DoesNotFit("Too big.", needed_bytes=5, free_bytes=3), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert code == 4 and told["error"]["needed_bytes"] == 5 and told["error"]["free_bytes"] == 3


def test_own_usage_error_and_typers_read_alike(qlazy, monkeypatch):
    raising(monkeypatch, UsageError("Not so.", hint="So."))
    assert qlazy("models").err == "Error: Not so.\nHint: So.\n"
    assert qlazy("models", "--jsn").err.splitlines()[1] == "Hint: See qlazy models --help."


def test_reader_that_leaves_is_no_error(environment):
    code = "import os, sys\nfrom qlazy.cli import main\nmain()"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, "models"], env=environment, stdout=writing, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_no_colours_in_a_file(shell):
    for arguments in (["--help"], ["plan", "--help"], ["models"], ["nope"]):
        done = shell(*arguments)
        assert "\x1b" not in done.out + done.err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_no_color_is_honoured_on_a_terminal(environment):
    import pty

    def on_terminal(**extra):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "qlazy", "--help"]
        with subprocess.Popen(
            command, env=environment | {"TERM": "xterm-256color"} | extra, stdout=theirs, stderr=theirs
        ) as child:
            os.close(theirs)
            shown = b""
            while True:
                try:
                    piece = os.read(ours, 65536)
                except OSError:  # the other end is closed
                    break
                if not piece:
                    break
                shown += piece
            child.wait()
        os.close(ours)
        return shown

    assert b"\x1b[1;36m" in on_terminal()
    assert b"36m" not in on_terminal(NO_COLOR="1")


def test_app_is_what_python_m_runs(shell):
    assert app.info.name == "qlazy"
    assert shell("--version").out == f"qlazy {package.__version__}\n"
