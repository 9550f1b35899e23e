"""Makes a plan from a spec and the checkpoints' headers; no tensor is read."""
