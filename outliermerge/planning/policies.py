"""The spec's policies for tensors that not all models have, or that cannot be merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from outliermerge.spec.check import MergeSpec
from outliermerge.spec.settings import Setting
from outliermerge.spec.similar import part_meant
from outliermerge.spec.text import Mistakes

Key = Literal["missing", "extra", "unequal"]


class Policies:
    """The spec's `missing`, `extra` and `unequal`, by model and by tensor.

    Raises:
        SpecError: a filter matches no tensor's name, or the word is `base` without a base model.
    """

    def __init__(
        self,
        spec: MergeSpec,
        model_numbers: Sequence[int],
        *,
        names: Iterable[str],
        has_base: bool,
    ) -> None:
        self._spec, self._model_numbers = spec, list(model_numbers)
        listed = list(names)
        levels: list[tuple[Key, Setting]] = [
            ("missing", spec.missing),
            ("extra", spec.extra),
            ("unequal", spec.unequal),
            *(("missing", model.missing) for model in spec.models),
            *(("extra", model.extra) for model in spec.models),
        ]  # fmt: skip
        mistakes = Mistakes(spec.source)
        for key, setting in levels:
            for entry in setting.entries:
                if entry.filter and not any(entry.matches(name) for name in listed):
                    near = part_meant(entry.filter, listed)
                    said = f"the filter {entry.filter!r} is in no tensor's name. {near}"
                    mistakes.found.append(spec.source.error(entry.filter_path, said))
                if entry.at(0) == "base" and not has_base:
                    said = f"`{key}: base` needs a `base_model`"
                    mistakes.found.append(spec.source.error(entry.path, said, at_key=True))
        mistakes.refuse()

    def word(self, key: Key, name: str, number: int | None = None) -> str | None:
        """Return the policy for a tensor, and for an input if models have their own policies."""
        levels = [getattr(self._spec, key)]
        if number in self._model_numbers:
            model = self._spec.models[self._model_numbers.index(number)]
            levels.insert(0, getattr(model, key))
        for setting in levels:
            if (entry := setting.entry_for(name)) is not None:
                word: str = entry.at(0)
                return word
        return None
