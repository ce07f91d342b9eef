"""The command lines' options, and `cellserve adopt`."""
