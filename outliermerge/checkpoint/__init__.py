"""Reading and writing weights: bytes, dtypes, headers and shards."""
