"""The output while it is being written, and its renaming to the final name."""
