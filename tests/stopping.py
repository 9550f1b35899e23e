"""Runs in this process that stop where a kill would have stopped them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from outliermerge.output.journal import Journal


@contextmanager
def stopping_after(
    monkeypatch: pytest.MonkeyPatch, num_tensors: int, *, key: str = "tensor"
) -> Iterator[None]:
    """Interrupt a run when so many tensors are in its journals and one more is about to be.

    Args:
        key: of the lines that are counted: `step` for those of an extraction.
    """
    add, num_added = Journal.add, 0

    def add_or_stop(journal: Journal, entry: Mapping[str, Any]) -> None:
        nonlocal num_added
        num_added += key in entry
        if num_added > num_tensors:
            raise KeyboardInterrupt
        add(journal, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_or_stop)
        yield
