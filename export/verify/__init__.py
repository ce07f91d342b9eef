"""The same numbers as Keras, and how fast."""
