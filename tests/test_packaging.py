"""What is shipped must be what is on disk, and what CI runs what the README says."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
FOLDERS = SETUPTOOLS["package-dir"]


def folder_of(package: str) -> Path:
    """Return where the files of a package are."""
    if package in FOLDERS:
        return ROOT / FOLDERS[package]
    return ROOT / "src" / package.replace(".", "/")


def test_every_package_is_listed():
    assert set(SETUPTOOLS["packages"]) == {*find_packages(str(ROOT / "src")), *FOLDERS}


def test_every_folder_of_modules_is_a_package():
    folders = {module.parent for module in (ROOT / "src").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_no_folder_hides_the_library_of_its_name(tmp_path):
    """`python -m` looks here first, where transformers imports `kernels` of the hub."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from_the_hub = True\n")
    done = subprocess.run(
        [sys.executable, "-c", "import kernels; assert kernels.from_the_hub, kernels.__file__"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_data_file_is_shipped():
    on_disk = {
        file
        for folder in FOLDERS.values()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in {".py", ".pyc"}
    }
    shipped = {
        file
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in folder_of(package).glob(pattern)
    }
    assert on_disk == shipped


def test_ci_runs_the_test_command_of_the_readme():
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("there is no README.md")
    commands = set(re.findall(r"python3 -m venv [^`\n]*nox -s tests", readme.read_text("utf-8")))
    assert commands, "README.md has no command of the form `python3 -m venv ... nox -s tests`"
    assert commands <= set((ROOT / ".ci" / "run").read_text("utf-8").splitlines())
