"""HOW it lies in bytes: shards, manifests, slices. No Ray, no filesystem."""
