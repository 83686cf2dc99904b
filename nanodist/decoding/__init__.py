"""From the bytes of a shard to pixels: all that a process which only reads has to import."""
