"""A step becomes ONNX graphs over time."""
