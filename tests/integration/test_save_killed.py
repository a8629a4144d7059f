"""Saves that are killed at any moment: the folder is the old one, absent, or the new one, and the next save goes on."""

from __future__ import annotations

import json

import pytest

MOMENTS = 50

SCRIPT = """
import hashlib, json, os, random, resource, shutil, signal, sys
from pathlib import Path

import torch
import transformers

torch.set_num_threads(1)
from qlazy.saving.folder import MANIFEST
from qlazy.planning.recipe import make_recipe
from qlazy.saving.save import save
from qlazy.sources.source import open_source
from qlazy.errors import OutOfSpace, QlazyError
from qlazy.saving.saved import verify

torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
transformers.LlamaForCausalLM(config).bfloat16().save_pretrained("model")
(Path("model") / "tokenizer.json").write_text("{}")


def run(folder, recipe, kill_at=0):
    # A child saves, and kills itself before the n-th step that reaches the disk; else it tells how many there were.
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        steps = 0
        def counted(real):
            def call(*args, **kwargs):
                nonlocal steps
                steps += 1
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call
        write = os.write
        for name in ("write", "fsync", "rename", "unlink", "rmdir", "mkdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        report = save(open_source("model"), recipe, folder, force=True, shard_bytes=20_000, drop_page_cache=False)
        write(tell, json.dumps([steps, report.shards, report.shards_resumed]).encode())
        os._exit(0)
    os.close(tell)
    answer = b"".join(iter(lambda: os.read(told, 1000), b""))
    os.close(told)
    _, status = os.waitpid(child, 0)
    return status, json.loads(answer) if answer else None


def content(folder):
    # Without the manifest of what it was made of, which the two have in common, and with every byte.
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


new, old = make_recipe(), make_recipe(bits=8)
run(Path("new"), new)
run(Path("old"), old)
expected, before = content(Path("new")), content(Path("old"))
_, (steps, shards, _) = run(Path("fresh"), new)
choose = random.Random(7)
moments = sorted(choose.sample(range(1, steps + 1), int(sys.argv[1])))
seen = {"old": 0, "absent": 0, "new": 0, "resumed": 0, "killed": 0, "steps": steps, "shards": shards}
for number, moment in enumerate(moments):
    folder, replaces = Path(f"target{number}"), number % 2
    if replaces:
        shutil.copytree("old", folder)
    status, _ = run(folder, new, moment)
    seen["killed"] += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    found = content(folder) if folder.exists() else None
    assert found in ([before, expected] if replaces else [None, expected]), (moment, found)
    seen["absent" if found is None else "old" if found == before else "new"] += 1
    partial = Path(f".{folder.name}.qlazy-partial")
    if (partial / "config.json").is_file():
        assert content(partial).items() >= expected.items() or found == expected, moment
    elif partial.exists():
        try:
            open_source(partial)
        except QlazyError:
            pass
        else:
            raise AssertionError("a folder in the making opens")
    status, told = run(folder, new)
    assert status == 0 and content(folder) == expected, moment
    seen["resumed"] += told[2] > 0
    verify(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save(open_source("model"), new, "limited", shard_bytes=20_000)
except OutOfSpace as error:
    seen["full"] = error.message
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_killed_at_random_moments(python):
    seen = json.loads(python(SCRIPT, str(MOMENTS)).stdout)
    assert seen["killed"] == MOMENTS, seen
    assert seen["old"] + seen["absent"] + seen["new"] == MOMENTS
    assert seen["old"] > 10 and seen["absent"] > 10 and seen["resumed"] > 20, seen
    assert "limited/model-00001-of-" in seen["full"] and "File too large" in seen["full"]
