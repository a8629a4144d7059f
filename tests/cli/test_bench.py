"""`qlazy bench`: a table on stdout, and failures before anything is loaded."""

from __future__ import annotations

import sys

import pytest

SMALL = ("-p", "8", "-n", "2", "-r", "2")


def test_table_on_stdout_and_progress_on_stderr(qlazy, tiny):
    done = qlazy("bench", tiny, "-p", "8,16", "-p", "4", "-n", "2", "-r", "2")
    assert done.code == 0
    head, _, *rows = [line for line in done.out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.strip("|").split("|")][-2:] == ["test", "tokens/s"]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[-2] for row in cells] == ["pp8", "pp16", "pp4", "tg2"]
    assert all(" ± " in row[-1] and row[1].startswith("int4-") and row[4] == "cpu" for row in cells)
    assert "Loaded in " in done.out and "while loading" in done.out
    places = [done.err.index(mark) for mark in ("One warm-up and 2 on the clock", "pp8", "pp16", "pp4", "tg2")]
    assert places == sorted(places) and "|" not in done.err


def test_json_has_the_report_of_the_load_too(qlazy, tiny):
    done = qlazy("bench", tiny, *SMALL, "--bits", "8", "--json")
    assert done.code == 0 and done.err == ""
    found = done.json
    assert found["schema"] == 1 and found["format"].startswith("int8") and found["report"]["tensors_loaded"] == 21
    assert [(timing["test"], len(timing["seconds"])) for timing in found["timings"]] == [("pp8", 2), ("tg2", 2)]
    assert found["load_peak_bytes"] == found["report"]["host_peak_bytes"]


def test_quiet_says_the_table_alone(qlazy, tiny):
    done = qlazy("bench", tiny, "-p", "0", "-n", "2", "-r", "1", "-q")
    assert done.err == "" and "tg2" in done.out and "pp" not in done.out


def test_plot_is_drawn(qlazy, tiny, tmp_path):
    assert qlazy("bench", tiny, *SMALL, "--plot", tmp_path / "bench.svg").code == 0
    drawn = (tmp_path / "bench.svg").read_text()
    assert all(words in drawn for words in ("tokens per second", "pp8", "tg2"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "many"], "--prompt-tokens 'many' is not a list of numbers"),
        (["-n", "8,-1"], "--gen-tokens '8,-1' is not a list of numbers"),
        (["-n", "8,"], "--gen-tokens '8,' is not a list of numbers"),
        (["-p", "0", "-n", "0"], "There is nothing to time"),
        (["-p", "4097"], "A test of 4097 tokens needs more than the 4096"),
        (["-p", "128", "-n", "64", "--max-model-len", "100"], "A test of 128 tokens needs more than the 100"),
        (["-r", "0"], "'--repetitions' / '-r'"),
        (["--plot", "bench.bmp"], "no kind of picture"),
        (["--plot", "no-such-folder/bench.png"], "there is no folder"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_load(qlazy, tiny, arguments, words):
    done = qlazy("bench", tiny, *arguments)
    assert done.code == 2 and done.out == "" and words in done.err and "Hint: " in done.err
    assert "Reading" not in done.err


def test_without_matplotlib_a_plot_is_refused_before_the_load(qlazy, tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (["bench", tiny, *SMALL], ["load", tiny]):
        done = qlazy(*command, "--plot", tmp_path / "plot.png", "--json")
        assert done.code == 2 and "needs matplotlib" in done.err and "Reading" not in done.err
        assert done.json["error"]["hint"] == "pip install matplotlib"
    assert list(tmp_path.iterdir()) == []


def test_more_positions_than_the_model_has(qlazy, tiny):
    done = qlazy("bench", tiny, "-p", "513", "-n", "0")
    assert done.code == 2 and "needs 513 positions; LlamaForCausalLM has 512" in done.err


def test_what_does_not_fit_is_refused_before_torch_is_imported(shell, tiny):
    done = shell("bench", tiny, "--max-memory", "cpu=1MiB")
    assert done.code == 4 and done.out == "" and "Reading" not in done.err


def test_compiled_says_so_before_it_measures(qlazy, tiny, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    done = qlazy("bench", tiny, *SMALL, "--compile")
    assert done.code == 0 and "tg2" in done.out
    assert done.err.index("Compiled in ") < done.err.index("Timing pp8")
