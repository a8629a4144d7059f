"""`qlazy models` and `qlazy configs`: what is shipped, listed, printed and copied."""

from __future__ import annotations

import pytest
import yaml

from qlazy.configs import aliases, config_root


def test_models_lists_every_alias(qlazy):
    done = qlazy("models")
    assert done.code == 0 and done.err == ""
    assert [line.split()[0] for line in done.out.splitlines()] == list(aliases())
    (line,) = [line for line in done.out.splitlines() if line.startswith("llama-70b ")]
    assert aliases()["llama-70b"].id in line
    assert ("gated" in line.split()) == aliases()["llama-70b"].gated


def test_models_as_json(qlazy):
    found = qlazy("models", "--json").json
    assert found["schema"] == 1
    assert {m["name"]: (m["id"], m["gated"], m["note"]) for m in found["models"]} == {
        name: (alias.id, alias.gated, alias.note) for name, alias in aliases().items()
    }


def test_configs_ls_and_cat(qlazy):
    names = qlazy("configs", "ls").out.split()
    assert {"models.yaml", "recipes/int4.yaml"} <= set(names)
    assert qlazy("configs", "ls", "--json").json == {"schema": 1, "files": names}
    content = (config_root() / "recipes" / "int4.yaml").read_text()
    for name in ("recipes/int4.yaml", "recipes/int4", "int4", "int4.yaml"):
        assert qlazy("configs", "cat", name).out == content
    assert yaml.safe_load(qlazy("configs", "cat", "int4", "--json").json["content"])["bits"] == 4


def test_configs_cp(qlazy, tmp_path):
    content = (config_root() / "recipes" / "nf4.yaml").read_bytes()
    assert qlazy("configs", "cp", "nf4", tmp_path).out == f"{tmp_path / 'nf4.yaml'}\n"
    assert (tmp_path / "nf4.yaml").read_bytes() == content
    done = qlazy("configs", "cp", "recipes/nf4.yaml", tmp_path / "mine.yaml", "--json")
    assert done.json == {"schema": 1, "name": "recipes/nf4.yaml", "path": str(tmp_path / "mine.yaml")}
    assert (tmp_path / "mine.yaml").read_bytes() == content


def test_configs_cp_overwrites_only_by_force(qlazy, tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("precious")
    done = qlazy("configs", "cp", "nf4", target)
    assert done.code == 2 and f"{target} exists." in done.err and target.read_text() == "precious"
    assert qlazy("configs", "cp", "nf4", target, "--force").code == 0
    assert "nf4" in target.read_text()


def test_configs_cp_into_a_folder_that_is_not_there(qlazy, tmp_path):
    done = qlazy("configs", "cp", "nf4", tmp_path / "no" / "mine.yaml")
    assert done.code == 2 and "cannot be written" in done.err


@pytest.mark.parametrize("name", ["nope", "../pyproject.toml", "/etc/passwd", "recipes/../models.yaml", ""])
def test_configs_are_only_those_shipped(qlazy, name):
    done = qlazy("configs", "cat", name)
    assert done.code == 2 and "There is no configuration" in done.err and done.out == ""


def test_configs_alone_is_a_usage_error(qlazy):
    assert qlazy("configs").code == 2
