"""The command `cellserve bench`: measures a server with a user's own model (docs/how-to/benchmark.md).

It needs the client's packages and rich, no ONNX Runtime and no C compiler.
"""
