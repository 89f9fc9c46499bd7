"""Gradients that are used where they lie: on one rank, or where another has averaged them."""
