"""A DeepSpeed config: its keys, their types, and how it is read."""
