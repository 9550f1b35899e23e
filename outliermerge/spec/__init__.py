"""The YAML spec; no other room knows YAML."""
