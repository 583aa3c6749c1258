"""The compiler's own vocabulary: one internal form per thing that language models are made of.

Passes that recognise something produce these forms, lowering passes turn them into what a target likes best; they meet
only here. `concept` is the mechanism, the other modules are the dictionary.
"""
