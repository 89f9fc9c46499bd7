"""Gradients that this optimizer averages over several ranks."""
