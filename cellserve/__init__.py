"""The command line of Cellserve."""
