"""The benchmark that prints the performance table: `python -m bench`."""

import os

# Keeps ONNX Runtime from sending telemetry; every process started from here inherits it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
