"""Checks what would be published: `python scripts/release_check.py`, which `make release-check` calls.

It builds the sdist, the wheel from it, and a software bill of materials (CycloneDX) of each flavour in `dist/`, and
ends with one line for each thing that is wrong. `--unreleased` accepts a changelog that has no date yet.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FLAVOURS = ("cpu", "gpu")


def check_changelog(project: dict[str, Any], text: str, unreleased: bool, tag: str | None) -> Iterator[str]:
    """Tells where version, changelog and tag differ."""
    version = project["version"]
    found = re.search(r"^## (\S+), (.+)$", text, re.M)
    if not found or found[1] != version:
        yield f"CHANGELOG.md begins with version {found and found[1]}, pyproject.toml says {version}"
    elif not unreleased and not re.fullmatch(r"\d{4}-\d\d-\d\d", found[2]):
        yield f"CHANGELOG.md says {found[2]!r} of version {version}: write the day, as 2026-01-31"
    if tag is not None and tag != f"v{version}":
        yield f"the tag is {tag}, and the version {version} wants v{version}"


def check_labels(project: dict[str, Any], dockerfile: str) -> Iterator[str]:
    """Tells which labels the image lacks, or has for another version."""
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="(.*?)"', dockerfile))
    wanted = {"title": project["name"], "description": project["description"], "licenses": project["license"]}
    for name, value in {**wanted, "version": project["version"]}.items():
        if labels.get(name) != value:
            yield f"Dockerfile: the label org.opencontainers.image.{name} is {labels.get(name)!r} and not {value!r}"


def packaged() -> set[str]:
    """Returns the files that are installed, by their place in the package."""
    folders = ("cellserve", "export", "models", "service")
    listed = subprocess.run(["git", "ls-files", "-s", *folders], cwd=ROOT, check=True, capture_output=True, text=True)
    files = [line.split("\t") for line in listed.stdout.splitlines()]
    names = [name for mode, name in files if not mode.startswith("120000")]  # no links
    return {name if name.startswith("cellserve/") else f"cellserve/{name}" for name in names}


def check_wheel(names: set[str], wanted: set[str]) -> Iterator[str]:
    """Tells which files a wheel lacks, and which it should not have."""
    inside = {name for name in names if ".dist-info/" not in name}
    yield from (f"the wheel lacks {name}" for name in sorted(wanted - inside))
    yield from (f"the wheel has {name}, which is no file of the package" for name in sorted(inside - wanted))
    yield from (f"the wheel has no {name}" for name in ("LICENSE",) if not any(n.endswith(name) for n in names))


def check_sdist(names: set[str], wanted: set[str]) -> Iterator[str]:
    """Tells which files an sdist lacks, and whether it has parts that it should not have."""
    wanted = wanted | {"pyproject.toml", "README.md", "LICENSE"}
    yield from (f"the sdist lacks {name}" for name in sorted(wanted - names))
    strange = {name.partition("/")[0] for name in names} - {name.partition("/")[0] for name in wanted}
    made = {"", "PKG-INFO", "MANIFEST.in", "cellserve.egg-info", "setup.cfg"}
    yield from (f"the sdist has {name}" for name in sorted(strange - made))


def build(dist: Path) -> tuple[Path, Path]:
    """Builds sdist and wheel, and returns them."""
    shutil.rmtree(dist, ignore_errors=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # what an earlier build left would be packed too
    run("build", "--outdir", str(dist), str(ROOT))
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


def write_materials(dist: Path, version: str, flavour: str) -> Iterator[str]:
    """Writes the bill of materials of a flavour, and tells which pinned packages it lacks."""
    pins = ROOT / f"requirements/{flavour}.txt"
    file = dist / f"cellserve-{version}-{flavour}.cdx.json"
    options = ["--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "--of", "JSON", "-o", str(file)]
    run("cyclonedx_py", "requirements", *options, str(pins))
    listed = {(part["name"], part["version"]) for part in json.loads(file.read_text())["components"]}
    pinned = set(re.findall(r"^([\w.-]+)==([\w.+-]+)", pins.read_text(), re.M))
    yield from (f"{file.name} lacks {name} {number}" for name, number in sorted(pinned - listed))


def run(module: str, *arguments: str) -> None:
    """Runs a module of this Python, and shows what it printed if it fails."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{module} failed:\n{done.stdout}{done.stderr}")


def main() -> int:
    """Runs all checks; the status is 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unreleased", action="store_true", help="the changelog may have no date yet")
    parser.add_argument("--tag", help="the tag that is released, such as v1.2.3")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where to build (default: dist)")
    arguments = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    changelog, dockerfile = ((ROOT / name).read_text() for name in ("CHANGELOG.md", "Dockerfile"))
    wrong = [*check_changelog(project, changelog, arguments.unreleased, arguments.tag)]
    wrong += check_labels(project, dockerfile)
    sdist, wheel = build(arguments.dist)
    wanted = packaged()
    wrong += check_wheel(set(zipfile.ZipFile(wheel).namelist()), wanted)
    with tarfile.open(sdist) as archive:
        wrong += check_sdist({name.partition("/")[2] for name in archive.getnames()}, wanted)
    run("twine", "check", "--strict", str(sdist), str(wheel))
    for flavour in FLAVOURS:
        wrong += write_materials(arguments.dist, project["version"], flavour)
    for line in wrong:
        print(line)
    if not wrong:
        files = ", ".join(sorted(file.name for file in arguments.dist.iterdir()))
        print(f"version {project['version']} can be released: {files}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
