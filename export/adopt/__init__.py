"""Stateful ONNX models made elsewhere."""
