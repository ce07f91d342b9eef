"""What is published is checked, and CI only calls make."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def release() -> Any:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "scripts/release_check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_changelog_and_labels_agree(release: Any) -> None:
    assert not [*release.check_changelog(PROJECT, (ROOT / "CHANGELOG.md").read_text(), True, None)]
    assert not [*release.check_labels(PROJECT, (ROOT / "Dockerfile").read_text())]


def test_what_does_not_agree_is_reported(release: Any) -> None:
    project = {**PROJECT, "version": "1.2.3"}
    for text, tag, told in (
        ("## 1.2.2, 2026-01-31", None, "begins with version 1.2.2"),
        ("## 1.2.3, unreleased", None, "write the day"),
        ("## 1.2.3, 2026-01-31", "v1.2.2", "the tag is v1.2.2"),
    ):
        (line,) = release.check_changelog(project, text, False, tag)
        assert told in line
    assert not [*release.check_changelog(project, "## 1.2.3, 2026-01-31", False, "v1.2.3")]
    (line,) = release.check_labels(project, (ROOT / "Dockerfile").read_text())
    assert "image.version" in line
    names = {"cellserve/a.py", "cellserve-1.dist-info/licenses/LICENSE"}
    assert not [*release.check_wheel(names, {"cellserve/a.py"})]
    assert "lacks cellserve/b.py" in next(release.check_wheel(names, {"cellserve/a.py", "cellserve/b.py"}))
    assert "has cellserve/a.py" in next(release.check_wheel(names, set()))
    sdist = {"cellserve/a.py", "pyproject.toml", "README.md", "LICENSE"}
    assert [*release.check_sdist(sdist | {"tests/x.py"}, {"cellserve/a.py"})] == ["the sdist has tests"]


@pytest.mark.parametrize("form", ["bug.yml", "wish.yml"])
def test_an_issue_form_is_valid(form: str) -> None:
    file = ROOT / ".github/ISSUE_TEMPLATE" / form
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-issue-forms", str(file)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_valid_and_only_calls_targets_that_exist(workflow: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        called = re.fullmatch(r"(?:sudo )?make ([\w-]+)(?: \w+=\S+| \w+=\".*\")*", command)
        assert called and called[1] in targets, command
