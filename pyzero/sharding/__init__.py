"""Where masters, state and weights lie: buckets, shards, and whole tensors of them."""
