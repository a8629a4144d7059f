"""The shipped configuration files, and the aliases in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, model_validator

from qlazy import configs
from qlazy.errors import QlazyError


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    id: str
    revision: str | None = None
    gated: bool = False
    note: str
    package: str | None = None

    @model_validator(mode="after")
    def is_hub_id_or_packaged(self) -> Entry:
        pattern = r"[\w.-]+\.gguf" if self.package else r"[\w-][\w.-]*/[\w.-]+"
        assert re.fullmatch(pattern, self.id)
        return self


def test_models_yaml_is_valid() -> None:
    text = (configs.config_root() / "models.yaml").read_text(encoding="utf-8")
    entries = TypeAdapter(dict[str, Entry]).validate_python(yaml.safe_load(text))
    assert entries.keys() == configs.aliases().keys()
    assert len(re.findall(r"^[\w.-]+:", text, re.MULTILINE)) == len(entries), "an alias is given twice"
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in entries)


def test_the_families_have_aliases() -> None:
    names = configs.aliases()
    assert {"demo", "llama-8b", "llama-70b", "gpt-oss-20b"} <= names.keys()
    for family in ("qwen3", "mistral", "gemma", "phi", "deepseek"):
        assert any(name.startswith(family) for name in names), family
    assert names["llama-70b"].id == "meta-llama/Llama-3.3-70B-Instruct" and names["llama-70b"].gated


def test_broken_or_absent_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "config_root", lambda: tmp_path)
    for text in ("[", "- a", "a: 1", "a: {id: b, colour: red}"):
        (tmp_path / "models.yaml").write_text(text)
        configs.aliases.cache_clear()
        with pytest.raises(QlazyError, match=r"models\.yaml is not a map of model aliases"):
            configs.aliases()
    monkeypatch.undo()
    configs.aliases.cache_clear()
    package = tmp_path / "qlazy"
    monkeypatch.setattr(configs, "__file__", str(package / "configs.py"))
    with pytest.raises(QlazyError, match="Install qlazy again"):
        configs.config_root()
    (package / "configs").mkdir(parents=True)
    assert configs.config_root() == package / "configs"
