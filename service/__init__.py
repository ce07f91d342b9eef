"""The service: loads exported models with ONNX Runtime and serves their sequences and sessions over HTTP."""

import os

# ONNX Runtime 1.32 looks up a host of Microsoft's at every start, and keeps a device id and events in the user's cache,
# unless it finds this before it is imported; its own function for it, called after the import, comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
