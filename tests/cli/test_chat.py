"""`qlazy chat`: one answer a line, commands, Ctrl-C and the end of the input."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import time

import pytest

from qlazy.cli import chat
from qlazy.errors import UsageError


def test_a_pipe_has_an_answer_a_line(shell, tiny):
    done = shell("chat", tiny, "-q", "--max-new-tokens", "3", stdin="hello\nthe sea\n/exit\nnever\n")
    assert done.code == 0 and len(done.out.splitlines()) == 2 and done.err == ""


def test_json_is_refused(qlazy, tiny):
    done = qlazy("chat", tiny, "--json")
    assert done.code == 2 and "Hint: Use qlazy run --json." in done.err


def test_a_model_without_a_template_is_refused(qlazy, mute):
    done = qlazy("chat", mute, "--bits", "8", stdin="hello\n")
    assert done.code == 2 and "has no chat template" in done.err and f"qlazy run {mute} --bits 8 PROMPT" in done.err


class Parrot:
    """Stands for a loaded model: repeats the last message, and remembers what it was asked."""

    def __init__(self, *errors):
        self.asked = []
        self.errors = list(errors)

    def answer(self, messages, *, seed, **options):
        self.asked.append(([dict(m) for m in messages], seed))
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return type("Said", (), {"text": messages[-1]["content"].upper()})()


def talk(monkeypatch, parrot, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat.converse(parrot, max_new_tokens=4, temperature=0.0, seed=7)


def test_the_conversation_is_kept_and_reset_forgets_it(monkeypatch):
    parrot = Parrot()
    talk(monkeypatch, parrot, "one\n two \n/reset\nthree\n")
    first, second, third = (messages for messages, _ in parrot.asked)
    assert first == [{"role": "user", "content": "one"}]
    assert [m["content"] for m in second] == ["one", "ONE", "two"]
    assert [m["role"] for m in second] == ["user", "assistant", "user"]
    assert third == [{"role": "user", "content": "three"}]
    assert [seed for _, seed in parrot.asked] == [7, None, None]


def test_empty_lines_and_unknown_commands_are_not_asked(monkeypatch, capsys):
    parrot = Parrot()
    talk(monkeypatch, parrot, "\n/help\nx\n")
    assert len(parrot.asked) == 1
    assert capsys.readouterr().err.count("/reset forgets") == 2


def test_ctrl_c_stops_an_answer_and_forgets_half_of_it(monkeypatch, capsys):
    parrot = Parrot(None, KeyboardInterrupt())
    talk(monkeypatch, parrot, "one\ntwo\nthree\n")
    assert [m["content"] for m in parrot.asked[2][0]] == ["one", "ONE", "three"]
    assert "Stopped." in capsys.readouterr().err


def test_a_conversation_that_is_too_long_says_how_to_go_on(monkeypatch, capsys):
    parrot = Parrot(UsageError("The prompt has 9 tokens; memory is planned for 8."))
    talk(monkeypatch, parrot, "one\ntwo\n")
    assert len(parrot.asked[1][0]) == 1
    assert "planned for 8. /reset begins anew." in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_ends_with_ctrl_d_and_survives_ctrl_c_at_the_prompt(monkeypatch, capsys):
    said = iter([KeyboardInterrupt(), " hello ", EOFError()])

    def read(prompt):
        item = next(said)
        if isinstance(item, BaseException):
            raise item
        return item

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    assert chat.ask() == "hello"
    assert chat.ask() is None
    assert "/exit or Ctrl-D" in capsys.readouterr().err


def test_ctrl_c_in_a_pipe_ends(monkeypatch):
    class Pipe(io.StringIO):
        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Pipe())
    with pytest.raises(KeyboardInterrupt):
        chat.ask()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_conversation_on_a_terminal(environment, ctrl_c, tiny, tmp_path):
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qlazy", "chat", str(tiny), "--max-new-tokens", "2"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment | {"TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as child:
        os.close(theirs)
        shown = ""

        def until(words):
            nonlocal shown
            while words not in shown:
                assert select.select([ours], [], [], 60)[0], f"nothing but {shown!r}"
                shown += os.read(ours, 65536).decode()
            before, _, shown = shown.partition(words)
            return before + words

        try:
            assert chat.HELP in until("> ")
            os.write(ours, b"hello\n")
            until("hello")
            until("> ")
            time.sleep(1)  # a signal between the prompt and the wait for a key is only seen with the next key
            child.send_signal(signal.SIGINT)
            assert chat.HELP in until("> ")
            os.write(ours, b"\x04")
            assert child.wait(30) == 0
        finally:
            child.kill()
    os.close(ours)
