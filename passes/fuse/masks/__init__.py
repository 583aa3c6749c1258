"""Masks: what an attention mask says about which query sees which key, and the proof of it."""
