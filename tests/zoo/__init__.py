"""Tiny random models of many architectures, from every exporter, and the harness that compares two models."""
