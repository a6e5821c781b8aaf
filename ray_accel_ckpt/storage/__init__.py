"""WHERE the bytes go: filesystems, writing, finding checkpoints. No Ray."""
