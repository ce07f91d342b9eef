"""Cells, the example networks made of them, the real data that they learn, and the signature of what is served."""
