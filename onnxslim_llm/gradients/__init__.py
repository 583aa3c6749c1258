"""Gradients of ONNX graphs: the graph is executed in torch, which is imported only here and only when it is asked for.

`executor` runs a model, `operators/` says what each operator computes, `products` and `collect` turn gradients into
figures of single weights.
"""
