"""Writing a model: the layout first, then every weight streams into its place."""

from __future__ import annotations

from onnxslim_llm.ir.save.save import DetailJournal, Journal, SaveOptions, SaveReport, save_model, save_models

__all__ = [
    "DetailJournal",
    "Journal",
    "SaveOptions",
    "SaveReport",
    "save_model",
    "save_models",
]
