"""Shows warnings of the library and other packages at the terminal."""

from __future__ import annotations

import logging

from outliermerge.errors import readable

_WAITS = "outliermerge.checkpoint.model_types"  # says, for people, what it will wait for


class _Formatter(logging.Formatter):
    """Formats log messages without characters that control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        said = record.getMessage() if record.name == _WAITS else super().format(record)
        return readable(said)


def show_warnings(*, quiet: bool = False, verbose: int = 0) -> None:
    """Print warnings on the standard error; with `verbose` more, with `quiet` only errors."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.ERROR if quiet else level)
    if not quiet:
        logging.getLogger(_WAITS).setLevel(min(level, logging.INFO))
    # This logger has its own handler, so its warnings would be printed twice.
    hub = logging.getLogger("huggingface_hub")
    hub.propagate = False
    if quiet:
        hub.setLevel(logging.ERROR)
