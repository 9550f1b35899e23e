"""What the library and others log, as people at a terminal see it."""

from __future__ import annotations

import logging

from outliermerge.errors import readable


class _Formatter(logging.Formatter):
    """Logs what others wrote as a terminal shows it."""

    def format(self, record: logging.LogRecord) -> str:
        return readable(super().format(record))


def show_warnings() -> None:
    """Print warnings on the standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # It has a handler of its own, so its warnings would be printed twice.
    logging.getLogger("huggingface_hub").propagate = False
