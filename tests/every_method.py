"""The table's methods by kind: a test that is parametrised by these takes a new method up."""

from __future__ import annotations

from outliermerge.methods.table import METHODS

SEVERAL = [name for name, method in METHODS.items() if method.max_models is None]
OF_DELTAS = [name for name, method in METHODS.items() if method.uses_base]
NEEDS_BASE = [name for name, method in METHODS.items() if method.needs_base]
WITH_KERNELS = [name for name, method in METHODS.items() if method.kernel is not None]
