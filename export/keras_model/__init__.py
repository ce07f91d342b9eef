"""A Keras file becomes one explicit step."""
