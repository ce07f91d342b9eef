"""Makes the network that is measured: an LSTM of 128 units over 16 features with 4 outputs, and its exports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console


def make(folder: Path) -> dict[str, Any]:
    """Saves the network in a folder, exports it, and gives what the export measured beside the `Loop` and Keras."""
    from models.quiet import import_tensorflow

    import_tensorflow()
    import keras

    from export.exporter import Request, export
    from models.cells import LSTMCell
    from service.runtime import Runtime

    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [
            keras.Input((None, 16)),
            keras.layers.RNN(LSTMCell(128), return_sequences=True),
            keras.layers.Dense(4, activation="softmax"),
        ]
    )
    network.save(folder / "bench.keras")
    made = export(Request(folder / "bench.keras", "bench", folder / "artifacts"), Console(quiet=True))
    return dict(Runtime(made / "model.onnx").document.timings)


if __name__ == "__main__":
    print(json.dumps(make(Path(sys.argv[1]))))
