"""The Open Inference Protocol (KServe's V2) with Triton's extensions, over HTTP (`/v2`) and gRPC."""
