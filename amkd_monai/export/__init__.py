"""The student in use: a bundle without teachers and this package, and prediction by ONNX Runtime alone."""
