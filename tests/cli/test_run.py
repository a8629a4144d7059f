"""`qlazy run`: the answer alone on stdout."""

from __future__ import annotations


def test_answer_alone_on_stdout(qlazy, tiny):
    done = qlazy("run", tiny, "hello", "--max-new-tokens", "5")
    assert done.code == 0
    assert len(done.out.splitlines()) == 1
    assert "Reading" in done.err and "weights, cpu" not in done.err


def test_report_is_on_stderr(qlazy, tiny):
    done = qlazy("run", tiny, "hello", "--max-new-tokens", "5", "--report")
    plain = qlazy("run", tiny, "hello", "--max-new-tokens", "5", "-q")
    assert done.out == plain.out and plain.err == ""
    # TTY or not, a report has no colours.
    assert "\x1b" not in done.err
    for words in ("bits per weight", "Kept in bfloat16", "weights, cpu", "tokens/s"):
        assert words in done.err


def test_json_has_answer_and_report(qlazy, tiny):
    plain = qlazy("run", tiny, "hello", "--max-new-tokens", "5", "-q")
    done = qlazy("run", tiny, "hello", "--max-new-tokens", "5", "--json")
    assert done.err == ""
    assert done.json["schema"] == 1 and done.json["report"]["tensors_loaded"] == 21
    assert done.json["generated"]["text"] == plain.out.strip()
    assert 1 <= done.json["generated"]["tokens"] <= 5


def test_chat_template_is_used_unless_raw(qlazy, tiny, mute):
    asked = [
        qlazy("run", model, "the sea is", "--max-new-tokens", "8", "-q", *flags).out
        for model, flags in ((tiny, []), (tiny, ["--raw"]), (mute, []), (mute, ["--raw"]))
    ]
    # The two models differ in nothing but the template.
    assert asked[1] == asked[2] == asked[3] != asked[0]


def test_sampling_follows_the_seed(qlazy, tiny):
    def sample(seed):
        return qlazy("run", tiny, "hello", "--temperature", "3", "--seed", str(seed), "--max-new-tokens", "12", "-q").out

    assert sample(1) == sample(1) != sample(2)


def test_prompt_longer_than_planned_is_refused(qlazy, tiny):
    done = qlazy("run", tiny, "a b c d e f g h", "--max-model-len", "8", "--raw")
    assert done.code == 2 and "The prompt has 8 tokens; memory is planned for 8." in done.err
    assert "--max-model-len" in done.err


def test_answer_ends_where_memory_was_planned_to(qlazy, tiny):
    done = qlazy("run", tiny, "a b c", "--max-model-len", "7", "--raw", "--json")
    assert done.json["generated"]["tokens"] <= 4


def test_verbose_shows_what_libraries_say(shell, tiny):
    assert shell("run", tiny, "hello", "-v", "--max-new-tokens", "2").code == 0


def test_a_process_separates_its_streams(shell, tiny):
    done = shell("run", tiny, "hello", "--max-new-tokens", "3", "--json", env={"OMP_NUM_THREADS": "2"})
    assert done.code == 0 and done.err == "" and done.json["schema"] == 1


def test_demo_knows_the_capital_of_france(shell, demo):
    done = shell("run", demo, "What is the capital of France?", "--bits", "4", "--report", "--max-new-tokens", "24")
    assert done.code == 0 and "Paris" in done.out, done.err
    assert ("210 tensors" in done.err and "weights, cpu" in done.err) or "weights, cuda" in done.err


def test_compiled_says_so_and_answers_the_same(qlazy, tiny, monkeypatch):
    import torch

    def uncompiled(call, **options):
        compiled.append(options)
        return call

    compiled: list[dict] = []
    monkeypatch.setattr(torch, "compile", uncompiled)
    plain = qlazy("run", tiny, "hello", "--max-new-tokens", "5", "-q")
    done = qlazy("run", tiny, "hello", "--max-new-tokens", "5", "--compile")
    assert done.out == plain.out and len(compiled) == 1
    assert "Compiling the decoding step, once ...\nCompiled in " in done.err
    quiet = qlazy("run", tiny, "hello", "--max-new-tokens", "5", "--compile", "-q")
    assert quiet.out == plain.out and quiet.err == ""
