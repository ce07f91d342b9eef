"""The tests on a GPU: a suite of its own, made for a machine without network and without TensorFlow (docs/gpu.md)."""
