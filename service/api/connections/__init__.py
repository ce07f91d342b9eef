"""Connections: uvicorn's protocols within bounds, with the fast path, and the sockets they listen on."""
