"""Imports go one way, ``tuning -> serving -> cluster``, and the ground floor needs neither torch nor Ray."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "cluster": {"cluster"},
    "serving": {"serving", "cluster"},
    "tuning": {"tuning", "serving", "cluster"},
    "configs": {"configs"},
}
OURS = {"cluster", "serving", "tuning", "configs", "tests", "loraloom"}
HEAVY = ("torch", "ray", "vllm", "transformers", "peft", "datasets", "bitsandbytes", "pandas", "optuna")
# The floors of DESIGN's tree. F0 and the command lines import nothing heavy; the engine trains without Ray.
F0 = (
    "cluster.errors",
    "cluster.rules",
    "cluster.schema",
    "cluster.spec",
    "cluster.checks",
    "serving.spec",
    "serving.manifest",
    "serving.engine",
    "serving.access.fairness",
    "serving.access.key_file",
    "serving.registry.split",
    "serving.registry.events",
    "serving.registry.lookup",
    "serving.reload",
    "serving.registry.changes",
    "tuning.folder",
    "tuning.memory",
    "tuning.publish",
    "tuning.space",
    "tuning.tracking",
    "tuning.spec",
)
LIGHT = (
    *F0,
    "cluster.machine",
    "cluster.storage",
    "cluster.doctor",
    "cluster.cli",
    "cluster.prometheus",
    "serving.access.admission",
    "serving.access.keys",
    "serving.access.limits",
    "serving.metrics",
    "serving.registry.store",
    "serving.registry.object_store",
    "serving.registry.registry",
    "serving.adapters.cache",
    "serving.adapters.catalogue",
    "serving.http.envelope",
    "serving.http.haproxy",
    "serving.http.request",
    "serving.adapters.residency",
    "serving.http.usage",
    "serving.registry.view",
    "serving.cli",
    "tuning.cli",
    "tuning.compare.cli",
    "tuning.compare.source",
    "tuning.compare.document",
    "tuning.compare.server",
    "tuning.compare.tab",
    "loraloom",
)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: Path) -> set[str]:
    """The modules that ``source`` imports anywhere, also inside functions, by their full names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import; ours are absolute, so that the direction can be read"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    wrong = [
        f"{source.relative_to(ROOT)} imports {name}"
        for source in sources(package)
        for name in sorted(imported(source))
        if name.partition(".")[0] in OURS - MAY_IMPORT[package]
    ]
    assert sources(package)
    assert not wrong


def test_the_direction_test_sees_imports_inside_functions(tmp_path: Path) -> None:
    source = tmp_path / "bad.py"
    source.write_text("def late():\n    from tuning.spec import SweepSpec\n    import serving.spec\n")
    assert imported(source) == {"tuning.spec", "serving.spec"}


def loaded_by(module: str) -> list[str]:
    """Which heavy libraries are loaded after ``import module`` in a fresh interpreter."""
    code = f"import json, sys, {module}; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    assert loaded_by(module) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["sweep"], 2),
        (["sweep", "--resume", "nowhere"], 3),
        (["sweep", "configs/sweep/demo.yaml", "--set", "train.steps=-1"], 2),
        (["sweep", "configs/sweep/demo.yaml", "--dir", "/proc/x"], 5),
        (["sweep", "configs/sweep/demo.yaml", "--dir", "configs"], 4),
        (["estimate", "nowhere.yaml"], 3),
        (["publish", "nowhere", "--name", "x"], 3),
        (["serve", "nowhere.yaml"], 3),
        (["serve", "configs/serve/demo.yaml", "--set", "nonsense=1"], 2),
    ],
)
def test_mistakes_are_told_before_anything_heavy_is_imported(arguments: list[str], code: int) -> None:
    """Importing torch and Ray takes seconds, ten on slow machines."""
    command = [sys.executable, "-X", "importtime", "-m", "loraloom", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "typer" in imported
    assert not imported & set(HEAVY)


def test_the_engine_knows_no_ray() -> None:
    wrong = [
        f"{source.relative_to(ROOT)} imports {name}"
        for source in sources("tuning/engine")
        for name in imported(source)
        if name.partition(".")[0] == "ray"
    ]
    assert not wrong
