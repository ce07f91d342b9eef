"""What came out, for people."""
