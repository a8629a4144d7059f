"""What can be known of the GPU benchmarks without a GPU: files, tables, parts that are cut off, the word when there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_checkpoint
import gpu_kernels
import gpu_models
import gpu_report
import pytest
import torch
from safetensors.torch import load_file

import qlazy


def test_without_a_gpu_one_line_and_exit_code_2(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    script = Path(gpu.__file__)
    environment = os.environ | {"PYTHONPATH": f"{script.parents[1]}{os.pathsep}{script.parents[1] / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path / "out")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert done.stderr == "No CUDA device: benchmarks/gpu.py needs one that PyTorch can use.\n"


def test_checkpoint_of_repeated_weights_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checkpoint, "SHARD_BYTES", 1 << 20)
    monkeypatch.setattr(gpu_checkpoint, "PIECE_ELEMENTS", 1000)
    folder = gpu_checkpoint.write(tmp_path / "tiny", "tiny")
    held = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == gpu_checkpoint.tensors("tiny")
    assert all((tensor == 1).all() for tensor in held.values() if tensor.dim() == 1)
    assert all(0.01 < tensor.float().std() < 0.03 for tensor in held.values() if tensor.dim() == 2)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert sum(tensor.nbytes for tensor in held.values()) == gpu_checkpoint.nbytes("tiny")
    assert qlazy.load_quantized(folder, device_map="cpu", max_model_len=64).qlazy_report.tensors_loaded == len(held)
    before = sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir())
    gpu_checkpoint.write(folder, "tiny")
    assert sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir()) == before


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"format": "nf4"}])
def test_holes_take_no_disk_and_load_as_zeros(tmp_path, options):
    folder = gpu_checkpoint.write(tmp_path / "tiny", "tiny", holes=True)
    files = list(folder.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > gpu_checkpoint.nbytes("tiny")
    assert sum(512 * file.stat().st_blocks for file in files) < 64 << 10
    model = qlazy.load_quantized(folder, device_map="cpu", max_model_len=64, **options)
    assert (model.model.layers[1].mlp.down_proj.weight == 0).all()
    with torch.inference_mode():
        assert (model(input_ids=torch.tensor([[1, 2]])).logits == 0).all()


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(RuntimeError, match="has no room for 16 GB"):
        gpu_checkpoint.write(tmp_path / "8b", "8b")
    assert not list((tmp_path / "8b").glob("*.safetensors"))


def test_shapes_are_llama_3():
    assert gpu_checkpoint.nbytes("8b") == 2 * 8_030_261_248 and gpu_checkpoint.nbytes("70b") == 2 * 70_553_706_496
    layers = {(rows, columns) for shape in ("8b", "70b") for name, dims in gpu_checkpoint.tensors(shape).items()
              if "layers.0" in name and len(dims) == 2 for rows, columns in [dims]}  # fmt: skip
    assert layers == set(gpu_kernels.SHAPES.values())


DEVICE = {
    "name": "NVIDIA H100",
    "memory_bytes": 80 << 30,
    "multiprocessors": 132,
    "capability": "9.0",
    "count": 1,
    "cuda": "13.0",
    "driver": "580.1",
}
LOAD = {
    "format": "int4",
    "run": "again",
    "cache": "warm",
    "seconds": 1.0,
    "bytes_per_s": 16e9,
    "host_peak_bytes": 150 << 20,
    "host_peak_above_import_bytes": 700 << 20,
    "device_peak_bytes": (5000 + 60) << 20,
    "device_requested_peak_bytes": (5000 + 48) << 20,
    "weight_bytes": 5000 << 20,
    "planned_staging_bytes": 48 << 20,
}


def kernel_row(shape: str, name: str, tokens: int, seconds: float, how: str = "graph") -> dict:
    return {
        "shape": shape,
        "rows": 4096,
        "columns": 4096,
        "name": name,
        "tokens": tokens,
        "seconds": seconds,
        "how": how,
        "bytes_per_s": 2.1e12,
        "flops": 300e12,
    }


STAMP = {"took_s": 12.0, "commit": "abc"}


def result() -> dict:
    rows = [
        kernel_row("8b q, o", "bf16", 1, 20e-6),
        kernel_row("8b q, o", "bf16", 4096, 100e-6),
        kernel_row("8b q, o", "qlazy int4-g32-asym", 1, 5e-6),
        kernel_row("8b q, o", "qlazy int4-g32-asym", 4096, 120e-6),
        kernel_row("8b q, o", "bitsandbytes nf4", 1, 10e-6, "events"),
    ]
    ceilings = {"copy_bytes_per_s": 3e12, "upload_bytes_per_s": 50e9, "matmul_flops": 700e12}
    return {
        "schema": 1,
        "device": DEVICE,
        "versions": {"python": "3.12", "bitsandbytes": "absent"},
        "kernels": {"ceilings": ceilings, "rows": rows, "absent": {"8b down: x": "RuntimeError: no"}, **STAMP},
        "load": {"rows": [LOAD], "read_bytes_per_s": 20e9, **STAMP},
        "decode": {
            "rows": [{"format": "int4", "how": "compiled", "tokens_per_s": 200.0, "compile_s": 41.0}],
            "peer": {"rows": [{"format": "bitsandbytes nf4", "how": "generate", "tokens_per_s": 50.0}], "seconds": 30.0,
                     "host_peak_bytes": 1 << 30, "device_peak_bytes": 1 << 33},
            **STAMP,
        },
        "70b": {"rows": [LOAD | {"cache": "holes"}, {"tokens_per_s": 40.0}], "error": "took more than 70 s", **STAMP},
    }  # fmt: skip


def test_report_has_a_table_of_each_part_and_a_word_for_each_goal():
    text = gpu_report.render(result())
    assert "# qlazy on NVIDIA H100" in text and "driver 580.1" in text and "bitsandbytes absent" in text
    assert "| qlazy int4-g32-asym | 5.0 | 120.0 | 70 % | 43 % |" in text
    assert "| bitsandbytes nf4 | 10.0* | - | 70 % | - |" in text
    assert "bandwidth at M = 1 from 0.70 of the copy's (met)" in text
    assert "2.00 to 2.00 times as fast as bitsandbytes nf4 up to M = 16 (met)" in text
    assert "up to 1.20 of bf16's time at M = 4096 (**missed**)" in text
    assert "- 8b down: x: RuntimeError: no" in text
    assert "ran at 0.80 to 0.80 of it (met)" in text and "up to +0.0 MiB (met)" in text and "up to 700 MiB above the" in text
    assert "4.00 times transformers with bitsandbytes (met)" in text and "It generates 40.0 tokens/s" in text
    assert "**Not complete**: took more than 70 s" in text


@pytest.mark.parametrize("part", [*gpu.PARTS, "nothing"])
def test_report_of_what_is_there(part):
    only = {name: value for name, value in result().items() if name in (part, "device", "versions")}
    if part in only:
        only[part] = {"took_s": 1.0, "commit": "abc", "error": "killed by signal 9"}
    assert ("killed by signal 9" in gpu_report.render(only)) == (part in only)


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """The benchmark with children that are only noted; they find what `found` says of them."""
    calls, found = [], {}
    monkeypatch.setattr(gpu, "device", lambda: DEVICE)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: 0.0))  # as if nothing took any

    def call(script, *words, timeout_s, more=None):
        calls.append((script, *words))
        found.setdefault("given", {}).setdefault(words[0] if script == "gpu_models.py" else script, timeout_s)
        key = words[0] if script == "gpu_models.py" else script
        if script != "gpu_checkpoint.py" and key in found:
            Path(words[-2]).write_text(json.dumps(found[key]))
        return {"error": "killed"} if key in found.get("killed", ()) else {}

    monkeypatch.setattr(gpu, "call", call)
    arguments = ["--out", str(tmp_path / "out"), "--work-dir", str(tmp_path / "work"), "--model", "tiny"]
    return lambda *more: gpu.main([*arguments, *more]), calls, found, tmp_path / "out" / "gpu-nvidia-h100.json"


def test_parts_are_written_one_by_one_and_others_stay(on_a_gpu, capsys):
    run, calls, found, target = on_a_gpu
    kernels = result()["kernels"]
    found["gpu_kernels.py"], found["load"] = {key: kernels[key] for key in ("ceilings", "rows")}, {"rows": [LOAD]}
    assert run("--only", "kernels", "--commit", "first") == 0
    assert set(json.loads(target.read_text())) == {"schema", "device", "versions", "kernels"}
    assert run("--only", "load", "--commit", "second") == 0
    written = json.loads(target.read_text())
    assert written["kernels"]["commit"] == "first" and written["load"]["commit"] == "second"
    assert "## kernels" in target.with_suffix(".md").read_text() and "## load" in capsys.readouterr().out
    assert [call[0] for call in calls] == ["gpu_kernels.py", "gpu_checkpoint.py", "gpu_models.py"]


def test_a_part_that_was_cut_off_keeps_what_it_had(on_a_gpu):
    run, _, found, target = on_a_gpu
    found |= {"load": {"rows": [LOAD]}, "killed": ["load"]}
    assert run("--only", "load") == 1
    assert json.loads(target.read_text())["load"] | {"took_s": 0, "commit": ""} == {
        "rows": [LOAD], "error": "killed", "took_s": 0, "commit": "", "model": "tiny"}  # fmt: skip


def test_all_parts_in_their_time(on_a_gpu):
    run, calls, _, target = on_a_gpu
    run()
    assert [part for part in json.loads(target.read_text()) if part in gpu.PARTS] == list(gpu.PARTS)
    assert sum(gpu.PARTS.values()) < 480
    assert next(call[1] for call in calls if call[0] == "gpu_models.py") == "load"
    assert next(call[:2] for call in calls if "--holes" in call) == ("gpu_checkpoint.py", "70b")
    calls.clear()
    assert run("--seconds", "1") == 1 and calls == []


def test_time_that_a_part_leaves_goes_to_the_later_ones(on_a_gpu):
    run, _, found, _ = on_a_gpu
    run("--seconds", "200")
    given, shares = found["given"], list(gpu.PARTS.values())
    for number, script in ((0, "gpu_kernels.py"), (1, "load"), (3, "70b")):
        assert given[script] == pytest.approx(200 * shares[number] / sum(shares[number:])), script
    assert given["70b"] == 200, "nothing took any"


def test_a_failed_compile_costs_one_row(tmp_path, monkeypatch):
    def fails(model):
        raise TypeError("no such graph\nand where")

    monkeypatch.setattr(gpu_models, "load_once", lambda *args, **options: (object(), {}))
    monkeypatch.setattr(gpu_models, "tokens_per_s", lambda model: 3.0)
    monkeypatch.setattr(gpu_models, "compiled", fails)
    results = gpu_models.Results(tmp_path / "out.json")
    gpu_models.measure_decode(tmp_path, results, float("inf"), 0)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["format"], row["how"]) for row in found["rows"]] == [(name, "generate") for name in ("int4", "nf4", "int8")]
    assert found["not_compiled"] == "TypeError: no such graph"
    assert "Not compiled: TypeError: no such graph" in gpu_report.render(result() | {"decode": found | STAMP})


@pytest.mark.parametrize("error", [AttributeError, TypeError, type("OutOfResources", (Exception,), {})])
def test_a_contender_that_fails_is_absent_and_others_go_on(tmp_path, monkeypatch, error):
    def fails():
        raise error("shared memory\nand where")

    monkeypatch.setattr(gpu_kernels, "SHAPES", {"8b q, o": (8, 64)})
    monkeypatch.setattr(gpu_kernels, "ceilings", dict)
    monkeypatch.setattr(gpu_kernels.torch.cuda, "get_device_properties", lambda device: None)
    monkeypatch.setattr(gpu_kernels.torch, "randn", lambda *shape, device: torch.zeros(shape))
    monkeypatch.setattr(gpu_kernels, "contenders", lambda weight: iter([("peer", fails), ("bf16", lambda: (torch.relu, 2))]))
    monkeypatch.setattr(gpu_kernels, "time_calls", lambda calls, x: (1e-6, "graph"))
    gpu_kernels.measure(tmp_path / "out.json", 100.0)
    found = json.loads((tmp_path / "out.json").read_text())
    assert {row["name"] for row in found["rows"]} == {"bf16"}
    assert found["absent"] == {"8b q, o: peer": f"{error.__name__}: shared memory"}


def test_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        gpu.main(["--only", "everything"])
    assert error.value.code == 2 and "invalid choice" in capsys.readouterr().err


def test_read_rate_reads_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_models, "READ_BYTES", 1000)
    seen, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: seen.append(real(*args)) or seen[-1])
    for name, size in (("a", 12345), ("b", 10)):
        (tmp_path / name).write_bytes(bytes(size))
    assert gpu_models.read_rate([tmp_path / "a", tmp_path / "b"]) > 0
    assert sum(seen) == 12355


def test_results_are_on_disk_after_each_step(tmp_path):
    results = gpu_models.Results(tmp_path / "out.json")
    results.add(format="int4", seconds=1.0)
    assert json.loads((tmp_path / "out.json").read_text()) == {"rows": [{"format": "int4", "seconds": 1.0}]}
    results.note(read_bytes_per_s=2.0)
    assert json.loads((tmp_path / "out.json").read_text())["read_bytes_per_s"] == 2.0
