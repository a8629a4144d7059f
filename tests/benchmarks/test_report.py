"""The figures of a table come from its runs, and a goal is judged by the right ratio."""

import json

import pytest
import report


def run(contender, round_=0, **values):
    return {
        "contender": contender,
        "round": round_,
        "started": f"2026-01-01T00:00:0{round_}+00:00",
        "commit": "abc1234",
        "file_bytes": 4_000_000_000,
        "others_share": 0.01,
        "stolen_share": 0.0,
        **values,
    }


def model_run(contender, round_=0, **values):
    usual = {
        "load_s": 2.0,
        "load_again_s": 0.5,
        "anonymous_peak_bytes": 800 << 20,
        "total_peak_bytes": 900 << 20,
        "weight_bytes": 700 << 20,
        "token_bytes": 500_000_000,
        "ring_bytes": 64 << 20,
        "first_prompt_128_s": 1.0,
        "prefill_128": 100.0,
        "prefill_512": 120.0,
        "decode": 20.0,
    }
    return run(contender, round_, **(usual | values))


def result_of(*runs, **more):
    return {
        "model": "1.1b",
        "cache": "warm",
        "machine": {"processor": "Some CPU", "cores": 2, "memory_bytes": 24 << 30, "instructions": ["avx2"]},
        "versions": {"torch": "2.13.0"},
        "settings": {"threads": 2},
        "runs": list(runs),
        **more,
    }


def goals(result):
    lines = report.render(result).split("## Goals")[1].splitlines()
    return {cells[1].strip(): [c.strip() for c in cells[2:5]] for line in lines if len(cells := line.split("|")) > 4}


def test_cells_are_the_median_with_lowest_and_highest():
    runs = [model_run("qlazy-int4", r, load_s=s) for r, s in enumerate((3.0, 1.0, 9.0))]
    row = next(line for line in report.render(result_of(*runs)).splitlines() if line.startswith("| qlazy int4"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:7] == ["3.00 (1.00 - 9.00)", "0.50 (0.50 - 0.50)", "1.33", "700", "800"]


def test_load_is_compared_by_medians():
    runs = [model_run("qlazy-int4", r, load_s=s) for r, s in enumerate((2.0, 2.2, 50.0))]
    runs += [model_run("bnb-nf4", r, load_s=s) for r, s in enumerate((22.0, 20.0, 1.0))]
    assert goals(result_of(*runs))["load, int4 / bitsandbytes NF4"] == ["0.110", "<= 0.1", "**missed**"]
    runs[0]["load_s"] = 1.9
    runs[1]["load_s"] = 2.0
    assert goals(result_of(*runs))["load, int4 / bitsandbytes NF4"] == ["0.100", "<= 0.1", "met"]


def test_load_is_compared_with_reading_and_quantizing():
    runs = [model_run("qlazy-int4", load_s=3.0), run("cat", cat_s=0.5), run("quantizers", quantize_int4_s=1.5)]
    assert goals(result_of(*runs))["load, int4 / (`cat` + quantizing from memory)"] == ["1.500", "<= 1.5", "met"]


def test_decoding_is_compared_with_the_bandwidth():
    runs = [model_run("qlazy-int4", decode=14.0, token_bytes=1_000_000_000), run("bandwidth", bandwidth=20.0)]
    found = goals(result_of(*runs))
    assert found["decode, int4: weights read / read bandwidth"] == ["0.700", ">= 0.7", "met"]
    assert "| 14.00 |" in report.render(result_of(*runs))


def test_the_highest_peak_counts_not_the_median():
    low, high = 700 << 20, (700 + 64 + 64 + 1) << 20
    runs = [model_run("qlazy-int4", r, anonymous_peak_bytes=b) for r, b in enumerate((low, low, high))]
    name = "highest anonymous peak / (weights + ring + 64 MiB), int4"
    assert goals(result_of(*runs))[name][2] == "**missed**"
    assert goals(result_of(*runs[:2]))[name][2] == "met"


def test_what_was_not_measured_is_not_met():
    found = goals(result_of(model_run("qlazy-int4")))
    assert found["decode, int4 / llama.cpp Q4_0"] == ["no figure for llamacpp-q4_0 decode", ">= 1", "not measured"]


def test_a_peer_that_fails_is_absent_with_its_reason():
    result = result_of(
        model_run("qlazy-int4"),
        run("bnb-nf4", error="OSError: no such thing"),
        model_run("bf16"),
        run("bf16", 1, error="killed by signal 9"),
        absent={"llamacpp-q4_0": "llama_cpp is not installed"},
    )
    absent = report.render(result).split("## Absent")[1]
    assert "- llama.cpp Q4_0: llama_cpp is not installed" in absent
    assert "- transformers + bitsandbytes NF4: OSError: no such thing" in absent
    assert "- bf16, round 2 only: killed by signal 9" in absent


@pytest.mark.parametrize(("share", "warned"), [(0.04, False), (0.3, True)])
def test_a_busy_machine_is_said(share, warned):
    text = report.render(result_of(model_run("qlazy-int4", others_share=share), model_run("bf16")))
    assert ("not figures to quote" in text) == warned
    assert not warned or "during 1 of 2 runs" in text


def test_answers_of_the_demo_model_are_counted():
    runs = [model_run("qlazy-int4", r, answer_text=text) for r, text in enumerate(("It is Paris.", "It is | London."))]
    text = report.render(result_of(*runs) | {"model": "demo"})
    assert "| qlazy int4 | 1 of 2 | It is \\| London. |" in text
    assert "## Goals" not in text


def test_the_table_lies_beside_the_result(tmp_path):
    path = tmp_path / "1.1b.json"
    path.write_text(json.dumps(result_of(model_run("qlazy-int4"))))
    text = report.write_report(path)
    assert (tmp_path / "1.1b.md").read_text() == text
    assert text.startswith("# A random Llama of 1.1B, bfloat16: warm page cache\n")
