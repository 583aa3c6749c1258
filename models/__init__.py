"""The sample language model and the scripts that made it: corpus, tokenizer, network, training, export.

Nothing here is part of the installed package. Run a step from the repository root with
``python -m models.<step>``; see ``models/README.md`` for the order.
"""
