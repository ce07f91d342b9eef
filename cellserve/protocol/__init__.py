"""What client and server send each other, as bytes and dicts, without I/O (docs/reference/protocol.md)."""
