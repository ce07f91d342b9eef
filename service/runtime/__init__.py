"""One ONNX file, opened and run; the only room of the service that the export imports."""
