"""The tests; they mirror the folders of what they test."""

from cellserve import service as service  # first of all: it keeps ONNX Runtime from asking hosts that nobody named
