"""Runs every model over its reference with TF32 allowed or not: `python -m tests.gpu.tf32 FOLDER --provider cuda`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

from service.runtime import CPU, CUDA, providers, read_document
from tests.gpu.references import Reference, model_folder, names


def main() -> None:
    """Prints the largest difference from Keras of each model, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--provider", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--off", action="store_true", help="with ONNX Runtime's option use_tf32=0")
    told = parser.parse_args()
    cuda = (CUDA, {"use_tf32": "0" if told.off else "1"})
    chosen = [cuda, CPU] if CUDA in providers(told.provider) else [CPU]
    errors = {}
    for name in names(told.folder):
        session = ort.InferenceSession(str(model_folder(told.folder, name) / "model.onnx"), providers=chosen)
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
