"""Ways from checkpoints of this library to other tools, and back. Each is optional and thin."""
