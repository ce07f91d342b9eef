"""Runs every model over its reference with TF32 allowed or not: `python -m tests.gpu.tf32 FOLDER --provider cuda`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from cellserve.service.runtime.onnx_model import read_document
from cellserve.service.runtime.providers import CPU, CUDA
from tests.gpu.references import Reference, model_folder, names


def main() -> None:
    """Prints the largest difference from Keras of each model, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--provider", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--option", choices=("0", "1"), default="1", help="ONNX Runtime's use_tf32")
    parser.add_argument("--variable", choices=("0", "unset"), default="unset", help="NVIDIA_TF32_OVERRIDE")
    told = parser.parse_args()
    os.environ.pop("NVIDIA_TF32_OVERRIDE", None)  # NVIDIA's libraries, which read it, are loaded after this
    if told.variable == "0":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    chosen: list[Any] = [CPU]
    if told.provider == "cuda":
        ort.preload_dlls()
        chosen = [(CUDA, {"use_tf32": told.option}), CPU]
    errors = {}
    for name in names(told.folder):
        session = ort.InferenceSession(str(model_folder(told.folder, name) / "model.onnx"), providers=chosen)
        assert session.get_providers()[0] == (CUDA if told.provider == "cuda" else CPU)
        signature, reference = read_document(session).signature, Reference.read(told.folder / f"{name}.npz")
        fed = {signature.inputs[0].name: reference.x}
        fed |= {spec.name: state for spec, state in zip(signature.states, reference.states, strict=True)}
        if signature.lengths:
            fed[signature.lengths] = np.full(len(reference.x), reference.x.shape[1], np.int32)
        fetched = [signature.outputs[0].name, *(spec.next_name for spec in signature.states)]
        y, *final = session.run(fetched, fed)
        errors[name] = reference.error(y, final)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
