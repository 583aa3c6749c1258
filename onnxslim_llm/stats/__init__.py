"""What the data say: calibration inputs, and the moments of the inputs of every matrix product, collected once.

Every data-aware pass works from the same statistics: with H = XᵀX, the error that a change E of a weight makes in the
output of its product is tr(Eᵀ H E), so no activation is ever stored.
"""
