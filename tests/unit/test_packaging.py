"""What is shipped: one wheel with two import packages and the configs, and a `kernels/` folder that is in nobody's way."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the sdist as an index user's machine would build it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    assert len(list(out.glob("qlazy_llm-*.tar.gz"))) == 1
    (wheel,) = out.glob("qlazy_llm-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A new environment outside the repository with the wheel in it; its dependencies are the running environment's."""
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home / "env", with_pip=False)
    python = home / "env" / "bin" / "python"
    # `.pth` files in a folder that a `.pth` file names are not read, so an editable install of the repository stays out.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["install", "--no-deps", "--no-index", "--force-reinstall", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=home)
    return home


def test_wheel_holds_two_packages_and_the_configs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"qlazy", "qlazy_kernels"}
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert configs
    assert {f"qlazy/{name}" for name in configs} <= set(names)
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "qlazy").rglob("*")
        if path.suffix in (".py", ".c", ".h", ".cpp", ".txt")
    }
    assert sources <= set(names)
    assert {"qlazy/py.typed", "qlazy_kernels/py.typed"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_installed_outside_the_repository(installed):
    import qlazy

    bin_ = installed / "env" / "bin"
    assert qlazy.__version__ in run(bin_ / "qlazy", "--version", cwd=installed)
    assert qlazy.__version__ in run(bin_ / "python", "-m", "qlazy", "--version", cwd=installed)
    places = run(
        bin_ / "python",
        "-c",
        "import json, qlazy, qlazy.configs, qlazy_kernels.reference as kernels\n"
        "root = qlazy.configs.config_root()\n"
        "print(json.dumps([qlazy.__file__, kernels.__file__, str(root), (root / 'models.yaml').read_text()]))",
        cwd=installed,
    )
    *files, models = json.loads(places)
    for file in files:
        assert Path(file).is_relative_to(installed), f"{file} is not the installed one"
    assert models == (ROOT / "configs" / "models.yaml").read_text()


def test_doctor_runs_where_it_is_installed(installed):
    report = json.loads(run(installed / "env" / "bin" / "qlazy", "doctor", "--json", cwd=installed))
    assert report["schema"] == 1


def test_kernels_folder_is_never_a_package_of_ours():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    # None, Hugging Face's own package, or a namespace: with no loader behind it, it loses against every real package.
    if spec is not None and spec.origin is not None:
        assert not Path(spec.origin).is_relative_to(ROOT / "kernels")


def test_transformers_is_unaffected_from_the_repository_root(tmp_path):
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)\n"
        "print(sum(p.numel() for p in LlamaForCausalLM(config).parameters()), is_kernels_available())"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT) == run(sys.executable, "-c", code, cwd=tmp_path)


def test_every_module_has_its_line_in_the_structure_page():
    page = (ROOT / "docs" / "structure.md").read_text()
    paths = [path.relative_to(ROOT / "qlazy") for path in (ROOT / "qlazy").rglob("*.py") if not path.name.startswith("__")]
    names = [str(path) for path in paths if path.parts[0] not in ("cli", "lazy")]
    names += [path.name for path in (ROOT / "kernels" / "qlazy_kernels").glob("*.py") if not path.name.startswith("__")]
    assert [name for name in names if f"`{name}`" not in page] == []


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_pins_lie_within_the_ranges(wheel, python):
    """`pip install -c constraints.txt` must not be asked for the impossible, nor leave a dependency to chance."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        wanted = [Requirement(text) for text in message_from_bytes(archive.read(name)).get_all("Requires-Dist")]
    here = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(here)]
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert len(pinned) == len(pins), "a package is pinned twice"
    for requirement in wanted:
        package = canonicalize_name(requirement.name)
        assert package == "qlazy-llm" or requirement.specifier.contains(pinned[package]), str(requirement)
