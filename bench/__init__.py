"""What prints the performance table: `python -m bench`."""

import os

# ONNX Runtime asks a host of its maker's otherwise; every process that is started from here inherits this.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
