"""The output while it is being written, and how it takes its name."""
