"""The commands `cellserve serve`, `models` and `key`."""
