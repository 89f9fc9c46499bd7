"""Stage 3: weights sharded while a model is built, and torch's fully_shard."""
