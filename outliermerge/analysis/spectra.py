"""Leading singular values of a model's layers, and distances between layers computed from them.

The idea is from arXiv 2509.00046, of which only the abstract was read: it takes a number of
singular values of each projection, puts them into matrices by type of projection, and says that the
cosine distances follow a power law. Our reading: each type of module has a matrix with a row for
each layer, which has that layer's largest singular values. The distance of two rows of a matrix is
1 - cos. A power law is fitted to the distances of each type, and to those of all types together.
Our own choices are the number of values (16), the use of all types of module, and the laws that the
fit is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from outliermerge.analysis.extras import require
from outliermerge.analysis.models import Subject, open_subject
from outliermerge.analysis.places import find_places, short_names
from outliermerge.analysis.spectra_fingerprint import Fingerprint, LayerStd, make_fingerprint
from outliermerge.analysis.spectra_fit import PowerLawFit, fit_power_law
from outliermerge.analysis.spectra_values import cosine_distances, matrix_spectra
from outliermerge.arguments import checked, nothing
from outliermerge.display import short_repr
from outliermerge.errors import (
    ArgumentError,
    OutlierMergeError,
    argument,
    listing,
    shown,
)
from outliermerge.execution.threads import choose_device
from outliermerge.notebook import with_bar
from outliermerge.optional import require_torch

DEFAULT_NUM_VALUES = 16
FEWEST_LAYERS = 3

_DIMENSIONS = (2, 4)


@dataclass(frozen=True, slots=True)
class ModuleSpectra:
    """The matrices of one type of module and one shape, a row for each layer, by depth.

    Attributes:
        module: the name with layers' numbers replaced by `*`.
        shape: the shape of the matrices; for kernels of a convolution (out, in, height, width).
        layers: the layers' names, such as `model.layers.3`, (L,).
        singular_values: the largest singular values of each layer, in descending order, (L, K).
        stds: the σ of each layer's elements, (L,).
        distances: 1 - cos of all pairs of rows, (L * (L - 1) / 2,), beginning with rows 0 and 1.
        fit: the power law fitted to the distances; None if they are too few or too similar.
    """

    module: str
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    singular_values: tuple[tuple[float, ...], ...]
    stds: tuple[float, ...]
    distances: tuple[float, ...]
    fit: PowerLawFit | None

    def __repr__(self) -> str:
        verdict = self.fit.verdict if self.fit else "no fit"
        return short_repr(
            self, f"{self.module} {list(self.shape)}, {len(self.layers)} layers, {verdict}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all by name."""
        return asdict(self) | {"fit": self.fit.as_dict() if self.fit else None}


@dataclass(frozen=True, slots=True)
class LayerSpectra:
    """The spectra of a model's layers, or of its task vectors' against a base.

    Attributes:
        model, base: the names that the caller gave.
        num_values: the number of singular values of each matrix; a matrix with a smaller side has
            fewer.
        modules: types of modules, in the model's order.
        fit: the power law fitted to the distances of all types together.
        fingerprint: σ over depth, to be compared with other models' by `fingerprint_distance`.
        notes: notes for the user, such as tensors that were left out.
    """

    model: str
    base: str | None
    num_values: int
    modules: tuple[ModuleSpectra, ...]
    fit: PowerLawFit | None
    fingerprint: Fingerprint
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        what = self.model if self.base is None else f"{self.model} − {self.base}"
        return short_repr(
            self,
            f"{what}: {self.num_values} singular values of {len(self.modules)} types of module",
            f"all distances: {self.fit.verdict if self.fit else 'no fit'}",
        )

    @property
    def short_names(self) -> dict[str, str]:
        """The short name to show for each type of module."""
        return short_names(module.module for module in self.modules)

    def as_dict(self) -> dict[str, Any]:
        """Return all by name."""
        return asdict(self) | {
            "modules": [module.as_dict() for module in self.modules],
            "fit": self.fit.as_dict() if self.fit else None,
        }


@checked
@with_bar("the reading of spectra")
def layer_spectra(
    model: str | Path | Subject,
    *,
    num_values: int = DEFAULT_NUM_VALUES,
    base: str | Path | None = None,
    rename: str | None = None,
    device: str = "cpu",
    threads: int = 0,
    on_total: Callable[[int], None] = nothing,
    on_progress: Callable[[int], None] = nothing,
) -> LayerSpectra:
    """Return the leading singular values of a model's layers, and the distances between layers.

    The function takes all matrices whose type of module occurs in 3 or more layers with the same
    shape. Kernels of convolutions (out, in, height, width) count as matrices (out, in * height *
    width). Experts are left out, because a layer has several.

    Singular values are computed from the eigenvalues of the Gram matrix AAᵀ (or AᵀA, if that is
    smaller) in float64. A value v has a relative error of about 1e-16 (v₁ / v)². A matrix of S × T,
    S ≤ T, takes 2 S² T operations, and about 4 S³ for the eigenvalues. It takes memory for its
    stored bytes, about three times 8 S² bytes, and blocks of 128 MB.

    Args:
        model: a folder, a file, a hub id, an adapter, `base+adapter`, or a result of
            `open_subject`.
        num_values: largest singular values to take of each matrix; 2 or more.
        base: take the task vectors against this model instead of the weights.
        rename: from the model's tensor names to the base's, as `open_subject` takes it.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        threads: how many matrices the CPU works on at a time; 0 chooses by processors and memory.
        on_total: called once, before reading, with the number of bytes of the matrices.
        on_progress: called with the number of bytes just processed, by any thread.

    Raises:
        ArgumentError: an argument is wrong.
        OutlierMergeError: a model is absent or broken, has no such layers, or values that are
            infinite or NaN; `powerlaw` is not installed.
    """
    if num_values < 2:
        raise ArgumentError(
            f"{argument('num_values')}: found {num_values}, expected 2 or more: one has no angle"
        )
    require("powerlaw", "fitting a power law")
    require_torch("a table of singular values")
    subject = open_subject(model, base, rename=rename)
    groups, notes = _groups(subject)
    names = [member.name for members in groups.values() for member in members]
    on_total(sum(source.num_bytes for name in names for source in subject.tensors[name]))
    found = matrix_spectra(
        [subject.tensors[name] for name in names],
        num_values=num_values,
        device=choose_device(device),
        threads=threads,
        on_progress=on_progress,
    )
    spectra = dict(zip(names, found, strict=True))
    notes += [
        f"left out, since all its elements are equal: {shown(name)}"
        for name, (_, std) in spectra.items()
        if not std
    ]
    modules, matrices = [], []
    for (module, shape), members in groups.items():
        members = [member for member in members if spectra[member.name][1]]
        rows = tuple(spectra[member.name][0] for member in members)
        stds = tuple(spectra[member.name][1] for member in members)
        matrices += [
            LayerStd(module, member.depth, math.prod(shape), std)
            for member, std in zip(members, stds, strict=True)
        ]
        if len(members) >= FEWEST_LAYERS:
            layers = tuple(member.layer for member in members)
            distances = cosine_distances(rows)
            fit = fit_power_law(distances)
            modules.append(ModuleSpectra(module, shape, layers, rows, stds, distances, fit))
    if not modules:
        raise _nothing_found(subject)
    return LayerSpectra(
        model=subject.reference,
        base=subject.base,
        num_values=num_values,
        modules=tuple(modules),
        fit=fit_power_law([distance for module in modules for distance in module.distances]),
        fingerprint=make_fingerprint(subject.reference, matrices),
        notes=(*subject.notes, *notes),
    )


class _Member(NamedTuple):
    """The matrix of one layer."""

    depth: tuple[int, ...]
    layer: str
    name: str


_Groups: TypeAlias = dict[tuple[str, tuple[int, ...]], list[_Member]]


def _groups(subject: Subject) -> tuple[_Groups, list[str]]:
    """Return the matrices of each type of module and shape, by depth, and notes on others."""
    found: _Groups = {}
    left_out = []
    for name, place in find_places(subject.tensors).items():
        shape = subject.tensors[name][-1].shape
        if place.layer is None or sum(length > 1 for length in shape) < 2:
            continue
        if len(shape) in _DIMENSIONS:
            member = _Member(place.depth, place.layer, name)
            found.setdefault((place.module, shape), []).append(member)
        else:
            left_out.append(f"{shown(name)}: has {len(shape)} dimensions, as stacked experts do")
    groups = {}
    for (module, shape), members in found.items():
        kind = f"{module} {list(shape)}"
        if len({member.layer for member in members}) < len(members):
            left_out.append(f"{kind}: several in a layer, as experts are")
        elif len(members) < FEWEST_LAYERS:
            left_out.append(f"{kind}: in {len(members)} layer(s), fewer than {FEWEST_LAYERS}")
        else:
            groups[module, shape] = sorted(members)
    if not groups:
        raise _nothing_found(subject)
    return groups, [f"left out:\n{listing(left_out)}"] if left_out else []


def _nothing_found(subject: Subject) -> OutlierMergeError:
    of_base = f" against {subject.base}" if subject.base is not None else ""
    return OutlierMergeError(
        f"{subject.reference}{of_base}: found no type of module whose matrices are in "
        f"{FEWEST_LAYERS} layers or more with one shape and unequal elements, expected names such "
        "as 'model.layers.0.mlp.up_proj.weight'"
    )
