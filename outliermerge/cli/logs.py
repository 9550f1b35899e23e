"""Shows warnings of the library and other packages at the terminal."""

from __future__ import annotations

import logging

from outliermerge.errors import readable


class _Formatter(logging.Formatter):
    """Formats log messages without characters that control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return readable(super().format(record))


def show_warnings() -> None:
    """Print warnings on the standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # This logger has its own handler, so its warnings would be printed twice.
    logging.getLogger("huggingface_hub").propagate = False
