"""Which files of a folder, or of a repository of the hub, are a model; read `folder` first."""
