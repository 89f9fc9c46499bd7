"""A DeepSpeed config: its keys, what each can be, and how it is read."""
