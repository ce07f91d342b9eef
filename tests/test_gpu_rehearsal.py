"""The tests for a GPU, rehearsed on the CPU from references made for it, so that they run when there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

SECONDS = 900  # of each of the two, where the machine is busy; minutes where it is not
UNITS = 96  # of the large LSTM, which is not large here


def run(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # whatever the machine has, no GPU is seen
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def references(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "references"
    made = run("tests.gpu.prepare", folder, "--units", str(UNITS))
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.mark.long
@pytest.mark.timeout(2 * SECONDS)
def test_the_gpu_tests_pass_on_the_cpu_and_write_their_report(references: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    flags = "--provider", "cpu", "--references", references, "--report", report
    ran = run("pytest", "tests/gpu", *flags)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "skipped" not in ran.stdout.splitlines()[-1]
    text = report.read_text()
    assert text.startswith("# Cellserve rehearsed on the CPU: nothing here is of a GPU")
    sections = ("Machine", "Where nodes run", "Parity", "TF32", "batch invariance", "served", "Two processes")
    for section in (*sections, "Memory of states", "Steps a second"):
        assert section in text, section
    assert f"| lstm-{UNITS} | whole |" in text and "| sunspots-unproved | False |" in text


@pytest.mark.long
def test_the_benchmark_of_a_gpu_runs_on_the_cpu(references: Path, tmp_path: Path) -> None:
    few = "--units", str(UNITS), "--sessions", "1", "4", "--seconds", "0.05"
    told = tmp_path / "bench.json"
    ran = run("bench", "--provider", "cpu", "--references", references, *few, "--json", told)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(told.read_text())
    measured = {(row["what"].partition(",")[0], row["sessions"], row["where"]) for row in rows if row["steps_per_s"]}
    assert {("steps", 4, "Cellserve, cpu"), ("steps", 1, "bare ONNX Runtime, cpu, states bound")} <= measured
    assert any(what == "/predict" for what, _, _ in measured)
    nothing = run("bench", "--provider", "cpu", "--references", tmp_path)
    assert nothing.returncode == 2
    assert [line.partition(": make it")[0] for line in nothing.stderr.splitlines()] == [
        f"python -m bench: {tmp_path}/artifacts has no lstm-128, lstm-1024"
    ]


@pytest.mark.long
def test_without_references_or_a_gpu_one_line_says_what_is_missing(tmp_path: Path) -> None:
    nothing = run("pytest", "tests/gpu", "--provider", "cpu", "--references", tmp_path)
    assert nothing.returncode != 0
    assert [line for line in nothing.stderr.splitlines() if line] == [
        f"ERROR: {tmp_path}/ holds no references: make them with `make gpu-references` where TensorFlow is installed, "
        f"carry the folder here, and name it with --references"
    ]
    (tmp_path / "some.npz").touch()
    no_gpu = run("pytest", "tests/gpu", "--provider", "cuda", "--references", tmp_path)
    assert no_gpu.returncode != 0 and "passed" not in no_gpu.stdout and "skipped" not in no_gpu.stdout
    (line,) = [line for line in no_gpu.stderr.splitlines() if line]
    assert line.startswith("ERROR: the CUDA execution provider was requested, but")
