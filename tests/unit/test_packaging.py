"""What is installed and what is submitted are the same files: modules and the data they read, no documents."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from setuptools.dist import Distribution

from rlhf_ray.submit.pack import package_files

ROOT = Path(__file__).parents[2]


def wheel_files(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Setuptools' own list for the package, from pyproject.toml."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    modules = {os.path.relpath(path) for _, _, path in build.find_all_modules()}
    data = {os.path.relpath(os.path.join(src, name)) for _, src, _, names in build.data_files for name in names}
    return modules | data


def test_a_wheel_holds_what_a_submitted_package_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wheel_files(monkeypatch) == set(package_files())


def test_neither_holds_documents_or_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rlhf_ray").rglob("README.md")}
    assert documents, "there are some that could get in"
    for names in (wheel_files(monkeypatch), set(package_files())):
        assert len(names) > 100 and not names & documents
        assert not {name for name in names if name.endswith((".md", ".png"))}
