"""From a spec and the checkpoints' headers to a plan; no tensor is read."""
