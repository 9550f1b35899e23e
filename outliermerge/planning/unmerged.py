"""Refuses models that store weights as parts: an adapter's factors, or a norm and a direction."""

from __future__ import annotations

from collections.abc import Sequence

from outliermerge.checkpoint.adapters.unmerged import adapter_parts, composed, how_to_merge
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.planning.plan import Input


def refuse_unmerged(inputs: Sequence[Input]) -> list[str]:
    """Return notes on models that all store the same parts, which are then merged separately.

    Raises:
        OutlierMergeError: a model contains an adapter that is not merged into it, or stores factors
            of a weight that another model stores whole. No policy can convert one to the other.
    """
    notes = []
    for number, entry in enumerate(inputs):
        others = [other for other in inputs if other is not entry]
        names = entry.checkpoint.tensors
        parts = adapter_parts(names)
        # If an adapter is a part of the architecture, as in Phi-4-multimodal, all models have it.
        alone = len(parts) == len(names) or any(".default" in name for name in parts)
        if parts and (alone or not _all_have(parts, others)):
            raise OutlierMergeError(
                f"{shown(entry.reference)}: it holds {how_to_merge(names, parts)}\n"
                f"{listing(parts, limit=5)}"
            )
        made = composed(names)
        for other in others:
            plain = [n for n, w in made.items() if w in other.checkpoint.tensors and w not in names]
            if plain:
                raise OutlierMergeError(
                    f"{shown(entry.reference)}: it keeps weights as what torch makes them of, "
                    "which "
                    f"{shown(other.reference)} has as they are:\n{listing(plain, limit=5)}\n"
                    f"Load {shown(entry.reference)}, make them plain weights (torch.nn.utils."
                    "remove_weight_norm, remove_spectral_norm, prune.remove, or parametrize."
                    "remove_parametrizations) and save it again."
                )
        if number == 0 and (parts or made):
            apart = [*parts, *made]
            notes.append(
                f"{len(apart)} tensors are factors that weights are made of; each is merged by "
                "itself, which is not the merge of the weights that they make:\n"
                f"{listing(apart, limit=5)}"
            )
    return notes


def _all_have(names: Sequence[str], models: Sequence[Input]) -> bool:
    return all(name in model.checkpoint.tensors for model in models for name in names)
