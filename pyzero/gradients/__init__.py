"""From `.grad` to this rank's shards: hooks, buckets in flight, statistics."""
