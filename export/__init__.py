"""From torch to ONNX, graph surgery, and precision in the graph."""
