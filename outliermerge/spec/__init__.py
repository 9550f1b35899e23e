"""The YAML spec, the only place where YAML is known."""
