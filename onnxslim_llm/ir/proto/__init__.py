"""Between ONNX protos and graphsurgeon objects, losing nothing."""
