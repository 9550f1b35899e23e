"""Files of tensors: what their headers say, and where each tensor's bytes are."""
