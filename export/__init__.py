"""The export: a saved Keras model of recurrent layers becomes one ONNX file, proved exact before it is written."""
