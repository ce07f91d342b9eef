"""The client for threads: `socket.py` and `concurrency.py`; the rest is generated from `cellserve._async`."""
