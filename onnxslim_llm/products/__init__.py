"""Where a model multiplies with weights: which matrices it reads, how, and what the products stand for.

Every pass that changes weights (quantize, prune, split, fold) begins here.
"""
