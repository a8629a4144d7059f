"""A hub id on the command line, against a hub on loopback: planned by ranges, downloaded once, refused by name."""

from __future__ import annotations

import pytest

from tests.hub_server import COMMIT, serve_hub


@pytest.fixture
def hub(tiny, shell, tmp_path):
    """A hub with one model, and the command line that talks to it with an empty cache."""
    places = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    with serve_hub() as hub:
        hub.add("org/tiny", tiny)
        hub.shell = lambda *args, **env: shell(*args, env=places | {"HF_ENDPOINT": hub.url} | env)
        yield hub


def test_plan_downloads_no_weights(hub, tmp_path):
    done = hub.shell("plan", "org/tiny", "--json")
    assert done.code == 0, done.err
    assert done.json["resolved"] == "org/tiny"
    assert sum(tensor["source_nbytes"] > 0 for tensor in done.json["tensors"]) == 21
    assert hub.gets("model.safetensors") and None not in hub.gets("model.safetensors")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_heading_has_the_commit(hub):
    assert hub.shell("plan", "org/tiny").out.startswith(f"org/tiny @ {COMMIT[:7]}   ")


def test_run_downloads_once_and_answers(hub):
    first = hub.shell("run", "org/tiny", "hello", "--max-new-tokens", "3")
    assert first.code == 0, first.err
    assert "Downloading" in first.err and len(first.out.splitlines()) == 1
    asked = len(hub.gets("model.safetensors"))
    again = hub.shell("run", "org/tiny", "hello", "--max-new-tokens", "3", HF_HUB_OFFLINE="1")
    assert again.code == 0, again.err
    assert again.out == first.out and "Downloading" not in again.err
    assert len(hub.gets("model.safetensors")) == asked


def test_no_access_no_model_and_no_network_are_told_apart(hub):
    hub.gated["org/tiny"] = "hf_right"
    gated = hub.shell("plan", "org/tiny", "--json")
    absent = hub.shell("plan", "org/none", "--json")
    offline = hub.shell("plan", "org/tiny", "--json", HF_HUB_OFFLINE="1")
    assert [done.code for done in (gated, absent, offline)] == [3, 3, 3]
    assert [done.json["error"]["type"] for done in (gated, absent, offline)] == [
        "GatedModel",
        "ModelNotFound",
        "HubUnreachable",
    ]
    assert "gated" not in offline.err
    assert hub.shell("plan", "org/tiny", "--token", "hf_right").code == 0


def test_random_weights_fetch_the_config_alone(hub, tmp_path):
    done = hub.shell("load", "org/tiny", "--random-init", "--json")
    assert done.code == 0, done.err
    assert done.json["tensors_loaded"] == 21 and done.json["plan"]["resolved"] == "org/tiny"
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {"config.json"}
    again = hub.shell("load", "org/tiny", "--random-init", "--json", HF_HUB_OFFLINE="1")
    assert again.code == 0, again.err
    offline = hub.shell("load", "org/none", "--random-init", HF_HUB_OFFLINE="1")
    assert offline.code == 3 and "not in the cache" in offline.err
    assert not list(tmp_path.rglob("*.safetensors"))
