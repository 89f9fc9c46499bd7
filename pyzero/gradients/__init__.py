"""From `.grad` to this rank's shards: hooks, buckets on their way, statistics."""
