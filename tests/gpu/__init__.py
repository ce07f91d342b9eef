"""The tests on a GPU (docs/how-to/gpu.md): a suite of its own, for a machine without network and without TensorFlow."""
