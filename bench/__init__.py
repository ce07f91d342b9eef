"""What prints the performance table: `python -m bench`."""
