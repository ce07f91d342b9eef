"""The client for asyncio. All but `socket.py` and `concurrency.py` is also the source of `cellserve._sync`."""
