"""File formats of tensors: their headers, and where each tensor's bytes are."""
