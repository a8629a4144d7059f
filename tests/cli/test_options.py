"""The shared options: read once, from flags and from a recipe file."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlazy.cli.arguments import complete_model
from qlazy.cli.options import Options
from qlazy.cli.recipe_file import RECIPE_FIELDS, read_recipe
from qlazy.configs import config_root
from qlazy.errors import UsageError
from qlazy.planning.recipe import make_recipe

RECIPES = sorted(file.name.removesuffix(".yaml") for file in (config_root() / "recipes").iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_can_be_made(name):
    made = make_recipe(**read_recipe(name))
    assert made.format.name.startswith(name.split("-")[0])


def test_shipped_defaults_are_the_defaults():
    assert make_recipe(**read_recipe("int4")) == make_recipe()
    assert make_recipe(**read_recipe("int8")) == make_recipe(bits=8)
    assert make_recipe(**read_recipe("nf4")) == make_recipe(format="nf4")


def test_flags_win_over_the_recipe_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("bits: 8\ngroup_size: 64\nmodules_to_not_convert: [down_proj]\n")
    options = Options(recipe=str(file), group_size=128)
    assert options.recipe_arguments() == {"bits": 8, "group_size": 128, "modules_to_not_convert": ["down_proj"]}


def test_a_file_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("int4").write_text("bits: 8\n")
    assert read_recipe("int4") == {"bits": 8}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("bits: [", "is not YAML"),
        ("- 4", "holds no fields"),
        ("", "holds no fields"),
        ("bit: 4\nbits: 4", "has bit, which no recipe has"),
    ],
)
def test_recipe_that_cannot_be_meant(tmp_path, content, words):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        read_recipe(str(file))
    assert caught.value.hint


def test_absent_recipe_names_those_that_exist():
    with pytest.raises(UsageError, match="no recipe 'int5'") as caught:
        read_recipe("int5")
    assert "int4, " in caught.value.hint


def test_options_are_those_of_load_quantized():
    import inspect

    from qlazy.api import load_quantized

    parameters = inspect.signature(load_quantized).parameters
    everything = Options(bits=4, format="int4", group_size=64, symmetric=True, double_quant=True, head_bits=8)
    given = (
        everything.recipe_arguments()
        | Options(
            modules_to_not_convert=["x"], embedding_bits=8, module_bits=["x=8"], target_size="1GiB", target_bpw=4.3
        ).recipe_arguments()
        | everything.budget_arguments()
        | everything.source_arguments()
    )
    given |= everything.load_arguments()
    assert set(given) <= set(parameters)
    assert set(RECIPE_FIELDS) <= set(given)
    nothing = Options()
    assert nothing.recipe_arguments() == {}
    for name, value in (nothing.budget_arguments() | nothing.source_arguments() | nothing.load_arguments()).items():
        assert value == parameters[name].default, name


def test_lists_of_pairs():
    options = Options(max_memory="0=22GiB, cpu=16GiB", device_map="model.embed_tokens=cpu,=cuda:0")
    assert options.budget_arguments()["max_memory"] == {"0": "22GiB", "cpu": "16GiB"}
    assert options.budget_arguments()["device_map"] == {"model.embed_tokens": "cpu", "": "cuda:0"}


def test_command_is_what_was_typed():
    options = Options(
        bits=8, symmetric=False, modules_to_not_convert=["a", "b*"], local_files_only=True, token="hf_x", json=True
    )
    typed = options.command("chat", "org/name")
    assert typed == (
        "qlazy chat org/name --bits 8 --asymmetric --modules-to-not-convert a --modules-to-not-convert 'b*' --local-files-only"
    )


def test_completion_of_aliases_and_cached_models(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--org--name-7b").mkdir()
    (tmp_path / "datasets--org--text").mkdir()
    assert complete_model("org") == ["org/name-7b"]
    assert complete_model("dem") == ["demo"]
    assert complete_model("./") == []
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "hub" / "models--a--b").mkdir(parents=True)
    assert complete_model("a/") == ["a/b"]
