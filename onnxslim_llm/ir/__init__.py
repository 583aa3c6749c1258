"""The model in memory: onnx-graphsurgeon graphs, read and written without loss, with weights that stay on disk."""
