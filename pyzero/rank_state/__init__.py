"""The state of one rank as a state dict: made from its shards, and loaded into them."""
