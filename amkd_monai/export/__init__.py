"""The student leaves: a bundle without teachers and without this package, and prediction by ONNX Runtime alone."""
