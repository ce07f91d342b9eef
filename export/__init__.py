"""The export: a saved Keras model of recurrent layers becomes one ONNX file, proved exact before it is written."""

from cellserve import service as service  # first of all: it keeps ONNX Runtime from asking hosts that nobody named
