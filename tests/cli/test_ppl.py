"""`qlazy ppl`: figures on stdout, a text and a reference that can be meant, failures before anything is loaded."""

from __future__ import annotations

import re
import shutil

import pytest

FIGURES = ("perplexity", "reference_perplexity", "perplexity_ratio", "kl_mean", "kl_99", "same_top", "delta_p_rms")


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("what is the sea in one sentence : a b c d e f g h hello user assistant " * 8)
    return file


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """The tiny model, saved in four bits."""
    from qlazy import save_quantized

    folder = tmp_path_factory.mktemp("packed") / "tiny"
    save_quantized(tiny, folder, bits=4)
    return folder


def test_figures_on_stdout_and_the_rest_on_stderr(qlazy, tiny, prose):
    done = qlazy("ppl", tiny, "--file", prose, "--ctx", "64")
    assert done.code == 0
    # The head has 8 bits.
    first, *figures, last = done.out.splitlines()
    assert first == f"{tiny}: int4-g32-asym, 4.816 bits per quantized weight"
    assert len(figures) == 8 and all(" ± " in line for line in figures)
    assert last.startswith("149 tokens predicted, in 3 windows of up to 64; ± one standard error, by blocks of 32")
    assert "logits take 18 KiB in " in done.err and done.err.count("Reading 149 tokens") == 2


def test_the_reference_is_gone_before_the_model_is_loaded(qlazy, tiny, prose, monkeypatch):
    import weakref

    from qlazy.cli import generate

    load, loads = generate.load, []

    def watched(source, options, **more):
        held = [model for model, _ in loads if model() is not None]
        loaded = load(source, options, **more)
        loads.append((weakref.ref(loaded.model), held))
        return loaded

    monkeypatch.setattr(generate, "load", watched)
    assert qlazy("ppl", tiny, "-f", prose, "-q").code == 0
    assert [held for _, held in loads] == [[], []]


def test_json_and_8_bits_are_closer_than_4(qlazy, tiny, prose):
    four, eight = (qlazy("ppl", tiny, "-f", prose, "--json", "--bits", bits) for bits in ("4", "8"))
    assert four.code == eight.code == 0 and four.err == eight.err == ""
    found = four.json
    assert found["schema"] == 1 and found["reference"] == found["model"] == str(tiny) and found["file"] == str(prose)
    assert all(set(found[name]) == {"value", "error"} for name in FIGURES)
    assert found["reference_perplexity"] == eight.json["reference_perplexity"]
    assert 0 < eight.json["kl_mean"]["value"] < 0.1 * found["kl_mean"]["value"]
    assert 4.625 < found["bits_per_weight"] < 5 and found["report"]["tensors_loaded"] == 21


def test_everything_in_16_bits_is_the_reference_itself(qlazy, tiny, prose):
    found = qlazy("ppl", tiny, "-f", prose, "--modules-to-not-convert", "*", "--json").json
    assert found["kl_mean"] == {"value": 0.0, "error": 0.0} and found["same_top"]["value"] == 1.0
    assert found["bits_per_weight"] is None


@pytest.mark.parametrize("in_file", [False, True])
def test_a_target_is_the_models_and_not_the_references(qlazy, tiny, prose, tmp_path, in_file):
    (tmp_path / "aimed.yaml").write_text("target_bpw: 5.2\n")
    told = ["--recipe", tmp_path / "aimed.yaml"] if in_file else ["--target-bpw", "5.2"]
    done = qlazy("ppl", tiny, "-f", prose, *told)
    assert done.code == 0
    named = re.match(r"(.*): target of 5.2 bits per weight, (\S+) bits per quantized weight\n", done.out)
    assert named[1] == str(tiny) and 4.9 < float(named[2]) <= 5.2
    plain = qlazy("ppl", tiny, "-f", prose, "--json").json
    found = qlazy("ppl", tiny, "-f", prose, *told, "--json").json
    assert found["reference_perplexity"] == plain["reference_perplexity"]


def test_a_size_to_meet_that_16_bits_do_not(qlazy, tiny, prose):
    size = qlazy("plan", tiny, "--json").json["weight_bytes"] // 1024
    found = qlazy("ppl", tiny, "-f", prose, "--target-size", f"{size}KiB", "--json")
    assert found.code == 0 and found.json["report"]["plan"]["weight_bytes"] <= 1024 * size


def test_the_text_that_comes_with_qlazy(qlazy, tiny):
    found = qlazy("ppl", tiny, "--no-reference", "--max-tokens", "100", "--json").json
    assert found["tokens"] == 99 and found["windows"] == 1 and found["context_length"] == 512
    assert found["file"] is found["reference"] is found["kl_mean"] is None


def test_a_saved_model_needs_the_one_that_it_was_made_from(qlazy, tiny, packed, prose):
    refused = qlazy("ppl", packed, "-f", prose)
    assert refused.code == 2 and "in low bits already" in refused.err and "--reference" in refused.err
    against = qlazy("ppl", packed, "-f", prose, "--reference", tiny, "--json").json
    direct = qlazy("ppl", tiny, "-f", prose, "--json").json
    assert against["reference"] == str(tiny)
    assert all(against[name] == direct[name] for name in FIGURES)


def test_a_packed_reference_is_taken_as_it_is(qlazy, tiny, packed, prose):
    found = qlazy("ppl", tiny, "-f", prose, "--reference", packed, "--bits", "8", "--json").json
    back = qlazy("ppl", packed, "-f", prose, "--no-reference", "--json").json
    assert found["reference_perplexity"] == back["perplexity"] and found["kl_mean"]["value"] > 0


def test_without_a_tokenizer(qlazy, tiny, prose, tmp_path):
    bare = shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    done = qlazy("ppl", bare, "-f", prose)
    assert done.code == 3 and "has no tokenizer" in done.err and "Reading" not in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "33"], "The text has 33 tokens; a standard error needs more than 33"),
        (["--ctx", "1"], "'--context-length' / '--ctx' / '-c'"),
        (["--ctx", "4097"], "A window of 4097 tokens needs more than the 4096"),
        (["--file", "no-such-file"], "no-such-file cannot be read: No such file"),
        (["--reference", "demo", "--no-reference"], "exclude each other"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_load(qlazy, tiny, arguments, words):
    done = qlazy("ppl", tiny, *arguments)
    assert done.code == 2 and done.out == "" and words in done.err and "Hint: " in done.err
    assert "Reading" not in done.err


def test_a_file_that_is_no_text(qlazy, tiny, tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    done = qlazy("ppl", tiny, "--file", tmp_path / "image.png")
    assert done.code == 2 and "is not UTF-8: invalid start byte at byte 0" in done.err


def test_a_reference_that_does_not_fit_is_told_apart(shell, tiny):
    """Before torch is imported. The model itself fits."""
    refused = shell("plan", tiny, "--max-memory", "cpu=1KiB", "--reserve", "0GiB", "--json")
    enough = refused.json["error"]["needed_bytes"] // 1024 + 1
    done = shell("ppl", tiny, "--max-memory", f"cpu={enough}KiB", "--reserve", "0GiB")
    assert done.code == 4 and "Error: The reference, " in done.err and "Hint: Use --no-reference" in done.err


def test_no_room_for_the_logits(qlazy, tiny, prose, monkeypatch):
    monkeypatch.setattr("qlazy.measuring.logits.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    done = qlazy("ppl", tiny, "-f", prose)
    assert done.code == 1 and "logits take 18 KiB" in done.err and "TMPDIR" in done.err
