"""The parts of examples/train_gpt.py, of which the other examples borrow some."""
