"""JSON to arrays, and why not."""
