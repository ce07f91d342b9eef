"""The service: loads exported models with ONNX Runtime and serves their sequences and sessions over HTTP."""
