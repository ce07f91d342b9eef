"""The numbers are those of the CPU provider and of Keras, over many steps, however the steps are cut."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.providers import Provider
from tests.gpu.conftest import Open
from tests.gpu.references import ROWS, STEPS, Array, Reference, worst
from tests.gpu.report import Report
from tests.helpers import ROOT

CUTS = {
    "whole": (STEPS,),
    "chunks": (1, 7, 32, 33, 90, 91, 192, STEPS),
    "steps": tuple(range(1, STEPS + 1)),
}


@pytest.mark.parametrize("cuts", CUTS)
def test_a_run_is_within_the_allowance_of_keras_and_of_the_cpu(
    name: str, cuts: str, provider: Provider, opened: Open, reference: Reference, report: Report
) -> None:
    ours, cpu = (advanced(opened(name, on), reference, CUTS[cuts]) for on in (provider, "cpu"))
    off_keras, off_cpu = reference.error(*ours), worst((ours[0], *ours[1]), (cpu[0], *cpu[1]))
    report.row(
        f"Parity over {STEPS} steps of {ROWS} rows",
        {
            "model": name,
            "run": cuts,
            "off Keras": f"{off_keras:.1e}",
            "allowed": f"{reference.allowed:.1e}",
            "off the CPU provider": f"{off_cpu:.1e}",
            "CPU provider off Keras": f"{reference.error(*cpu):.1e}",
            "off float64 Keras": f"{worst((ours[0], *ours[1]), (reference.exact_y, *reference.exact_final)):.1e}",
            "float32 Keras off float64": f"{reference.keras_error:.1e}",
        },
    )
    assert off_keras <= reference.allowed
    assert off_cpu <= reference.allowed


def advanced(runtime: Runtime, reference: Reference, ends: Sequence[int]) -> tuple[Array, list[Array]]:
    """Runs a reference's sequences in chunks that end at these steps; gives y and the last states."""
    ys, states = [], reference.states
    for start, end in itertools.pairwise((0, *ends)):
        x = np.ascontiguousarray(reference.x[:, start:end])
        y, states = runtime.run(x, np.full(len(x), end - start, np.int32), states)
        ys.append(y)
    return np.concatenate(ys, axis=1), states


# Without TF32 an NVIDIA GPU multiplies float32 as float32; with it, 10 of the 23 bits of a mantissa are read. There are
# two switches: ONNX Runtime's option acts on its own products, NVIDIA's variable on all of NVIDIA's libraries, cuDNN's
# LSTM included, which ONNX Runtime leaves at cuDNN's default. Each stands in a process of its own.
TF32 = {
    "as ONNX Runtime comes": ("--option", "1", "--variable", "unset"),
    "use_tf32=0": ("--option", "0", "--variable", "unset"),
    "NVIDIA_TF32_OVERRIDE=0": ("--option", "1", "--variable", "0"),
    "both": ("--option", "0", "--variable", "0"),
}


@pytest.mark.parametrize("setting", TF32)
def test_what_tf32_costs_is_measured(setting: str, provider: Provider, folder: Path, report: Report) -> None:
    command = [sys.executable, "-m", "tests.gpu.tf32", str(folder.resolve()), "--provider", provider, *TF32[setting]]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    errors = json.loads(ran.stdout.splitlines()[-1])
    shown = {model: f"{error:.1e}" for model, error in errors.items()}
    report.row("Largest difference from Keras, with TF32 and without", {"setting": setting, **shown})
