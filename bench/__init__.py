"""What prints the performance table: `python -m bench`."""

import service as service  # first of all: it keeps ONNX Runtime from asking hosts that nobody named
