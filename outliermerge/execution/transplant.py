"""Computes the rows of a transplant, and how good they are.

Legend: S missing rows, K summands, N tokens in common, B rows of a block, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.combined import MEAN, CombinedRows, Sums, copies, row_blocks
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import DTYPES, Source
from outliermerge.errors import OutlierMergeError, argument, quoted, shown
from outliermerge.execution.pursuit import block_rows, interpolate, pursue
from outliermerge.execution.subtokens import Cutter
from outliermerge.optional import require_torch
from outliermerge.planning.transplant import Target, Transplant
from outliermerge.rng import uniform
from outliermerge.storage.stamps import Watched, watching

if TYPE_CHECKING:
    from torch import Tensor

_MOST_HELD_OUT, _SHARE_HELD_OUT = 256, 4
_NUM_WORST, _NUM_SHOWN = 10, 5


@dataclass
class _Found:
    """What missing rows are made of.

    Attributes:
        rows, weights: (S, K) of the model's rows; MEAN where nothing tells what a row is.
        has_basis: for each of them whether something does.
        errors: by row of those that have one, how far the donor's row is from the sum of the
            donor's rows, relative to its length.
        held_out: rows of the model that are left out, and what they would be made of.
    """

    rows: Tensor
    weights: Tensor
    has_basis: Sequence[bool]
    errors: Mapping[int, float] = field(default_factory=dict)
    held_out: tuple[Sequence[int], Tensor, Tensor] | None = None


def add_rows(
    planned: Transplant,
    *,
    device: str = "cpu",
    on_total: Callable[[int], None] = lambda num_bytes: None,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Transplant:
    """Compute a transplant's rows; return it with them, and with a report in its plan.

    In memory are the donor's rows of the tokens in common in float32, and a block of rows.

    Args:
        device: where sums of rows are looked for: `cpu` or `cuda`.
        on_total: called with the bytes of rows that are approximated.
        on_progress: called with the bytes of rows that have been.

    Raises:
        OutlierMergeError: torch is not installed, the model has no tokenizer.json for subtokens, or
            the two have no usable rows in common.
    """
    require_torch("a transplant")
    with watching(Watched(planned.plan.files)) as watched, Reader() as reader:
        maker = _Maker(planned, reader, device, on_total, on_progress)
        found = {target.name: maker.found(target) for target in planned.targets}
        report = maker.report(found)
        watched.check()
    sums = {name: Sums.of(one.rows, one.weights) for name, one in found.items()}
    followers = planned.plan.tied.items()
    sums |= {name: sums[original] for name, original in followers if original in sums}
    return planned.with_sums(sums, report, maker.notes(found, report))


class _Maker:
    def __init__(
        self,
        planned: Transplant,
        reader: Reader,
        device: str,
        on_total: Callable[[int], None],
        on_progress: Callable[[int], None],
    ) -> None:
        self.planned, self.reader, self.on_progress = planned, reader, on_progress
        self.device = device
        self.spec = planned.spec
        self.shared: Sequence[tuple[int, int]] = planned.pairing.shared
        if self.spec.needs_donor_rows:
            self.shared = self._usable()
        donors = {id(t.donor): t.donor for t in planned.targets if t.donor is not None}
        for donor in donors.values():
            on_total(4 * donor.shape[-1] * len(self._with_row(donor)))
        self._by_donor: dict[int, _Found] = {}

    def found(self, target: Target) -> _Found:
        """Return what a tensor's missing rows are made of."""
        match self.spec.approximation:
            case "subtokens":
                key, make = 0, self._of_subtokens
            case "mean":
                key, make = 0, self._mean
            case "zero":
                key, make = 0, self._zero
            case _:
                key, make = id(target.donor), lambda: self._of_donor(target.donor)
        if key not in self._by_donor:
            self._by_donor[key] = make()
        return self._by_donor[key]

    def _usable(self) -> list[tuple[int, int]]:
        """Return the tokens in common whose rows are finite, and in matrices not zero."""
        import torch

        shared = torch.tensor(self.shared)
        keep = torch.ones(len(shared), dtype=torch.bool)
        sides = [(target.source, 1) for target in self.planned.targets]
        sides += [(t.donor, 0) for t in self.planned.targets if t.donor is not None]
        for source, side in {id(source): (source, side) for source, side in sides}.values():
            columns = source.shape[-1] if len(source.shape) == 2 and source.shape[0] > 1 else 1
            # Into one tensor: small results between large ones would keep those from being freed.
            lengths = torch.empty(source.num_elements // columns, dtype=torch.float64)
            for start, rows in row_blocks(self.reader, source, columns):
                lengths[start : start + len(rows)] = rows.double().norm(dim=1)
            own = lengths[shared[:, side]]
            keep &= own.isfinite() & ((own > 0) | (columns == 1))
        if not keep.any():
            raise OutlierMergeError(
                f"none of the {len(shared):,} tokens that {shown(self.spec.model)} and "
                f"{shown(self.spec.donor)} have in common has rows in both that are finite and "
                f"not zero. {argument('method', 'subtokens')} needs no rows of the donor."
            )
        return [pair for pair, is_kept in zip(self.shared, keep.tolist(), strict=True) if is_kept]

    def _with_row(self, donor: Source) -> list[tuple[int, int]]:
        """Return the missing rows that the donor has a row of: place among them, and row."""
        tokens, rows = self.planned.tokens, donor.shape[0]
        missing = enumerate(self.planned.missing)
        return [(place, id_) for place, id_ in missing if id_ in tokens and id_ < rows]

    def _choose(
        self, targets_BC: Tensor, atoms_NC: Tensor, is_out_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        num_free = len(atoms_NC) - (0 if is_out_N is None else int(is_out_N.sum()))
        if self.spec.approximation == "omp":
            k = min(self.spec.k, num_free, atoms_NC.shape[1])
            return pursue(targets_BC, atoms_NC, k, is_out_N=is_out_N)
        return interpolate(targets_BC, atoms_NC, min(self.spec.k, num_free), is_out_N=is_out_N)

    def _of_donor(self, donor: Source | None) -> _Found:
        """Return missing rows as sums of the rows of tokens in common, by the donor's rows."""
        import torch

        assert donor is not None
        own = torch.tensor([row for _, row in self.shared])
        atoms = self._gathered(donor, [row for row, _ in self.shared], torch.float32)
        atoms = atoms.to(self.device)
        size, columns = len(self.planned.missing), donor.shape[-1]
        most = self.spec.k if self.spec.approximation != "omp" else min(self.spec.k, columns)
        k = min(most, len(atoms))
        rows = torch.full((size, k), MEAN)
        weights = torch.zeros(size, k, dtype=torch.float64)
        weights[:, 0] = 1.0
        has_basis = [False] * size
        errors: dict[int, float] = {}
        wanted, step = self._with_row(donor), block_rows(columns, k)
        for start in range(0, len(wanted), step):
            block = wanted[start : start + step]
            targets = self._gathered(donor, [id_ for _, id_ in block], torch.float64)
            lengths = targets.norm(dim=1)
            good = (lengths.isfinite() & (lengths > 0)).nonzero().flatten().tolist()
            if good:
                y_BC = targets[good].to(self.device)
                chosen, found = self._choose(y_BC, atoms)
                left = y_BC - torch.einsum("bk,bkc->bc", found, atoms[chosen].double())
                relative = (left.norm(dim=1).cpu() / lengths[good]).tolist()
                places = [block[number][0] for number in good]
                rows[places], weights[places] = own[chosen.cpu()], found.cpu()
                errors |= dict(zip(places, relative, strict=True))
                for place in places:
                    has_basis[place] = True
            self.on_progress(4 * columns * len(block))
        held_out = None
        if sample := self._sample(len(atoms)):
            is_out = torch.zeros(len(atoms), dtype=torch.bool, device=atoms.device)
            is_out[sample] = True
            parts = [
                self._choose(atoms[sample[at : at + step]].double(), atoms, is_out)
                for at in range(0, len(sample), step)
            ]
            chosen, found = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
            held_out = [int(own[place]) for place in sample], own[chosen], found
        return _Found(rows, weights, has_basis, errors, held_out)

    def _of_subtokens(self) -> _Found:
        """Return missing rows as means of the rows of the model's own pieces."""
        planned, ours, its = self.planned, self.planned.model, self.planned.donor
        home = planned.model_home
        cutter = Cutter(self.spec.model, home, ours)
        ids = []
        for row in planned.missing:
            token = planned.tokens.get(row)
            text = its.texts.get(row, b"" if token is None else token.encode())
            ids.append(cutter.cut(text) if token is not None and row not in its.single else [])
        rows, weights = _means(ids)
        names = {id_: token for token, id_ in ours.ids.items()}
        known = [row for _, row in self.shared if len(names[row].removeprefix("##")) > 1]
        held_out = None
        if sample := [known[place] for place in self._sample(len(known))]:
            without = Cutter(self.spec.model, home, ours, without=[names[row] for row in sample])
            held_out = sample, *_means([without.cut(ours.texts[row]) for row in sample])
        return _Found(rows, weights, [bool(own) for own in ids], held_out=held_out)

    def _mean(self) -> _Found:
        sample = [self.shared[place][1] for place in self._sample(len(self.shared))]
        size = len(self.planned.missing)
        held_out = (sample, *_means([[]] * len(sample))) if sample else None
        return _Found(*_means([[]] * size), [True] * size, held_out=held_out)

    def _zero(self) -> _Found:
        import torch

        size = len(self.planned.missing)
        nothing = torch.zeros(size, 0, dtype=torch.int64)
        return _Found(nothing, nothing.double(), [True] * size)

    def _sample(self, number: int) -> list[int]:
        """Return which of so many tokens in common are left out to try the approximation."""
        size = min(_MOST_HELD_OUT, number // _SHARE_HELD_OUT)
        drawn = uniform(0, "tokens that are held out", 0, number).argsort()[:size]
        return sorted(drawn.tolist())

    def _gathered(self, source: Source, rows: Sequence[int], dtype: Any) -> Tensor:
        """Return rows of a matrix (B, C); only these are read."""
        columns = source.shape[-1]
        shape = (len(rows), columns)
        picked = CombinedRows(
            name=source.name, shape=shape, out_dtype=source.out_dtype, dtype=source.dtype,
            source=source, copied=rows, basis="",
        )  # fmt: skip
        return self.reader.values(picked, 0, picked.num_elements).view(shape).to(dtype)

    def report(self, found: Mapping[str, _Found]) -> dict[str, Any]:
        """Return what has become of the tokens, and how good the rows are, as JSON values."""
        planned, pairing = self.planned, self.planned.pairing
        is_token = [row in planned.tokens for row in planned.missing]
        names = {row: token for token, row in planned.model.ids.items()}
        return {
            **{k: v for k, v in self.spec.as_dict().items() if k != "merge_method"},
            "num_tokens": len(planned.tokens),
            "num_copied": len(pairing.rows),
            "num_copied_by_role": len(pairing.by_role),
            "copied_by_role": {
                planned.tokens[id_]: names[pairing.rows[id_]] for id_ in pairing.by_role
            },
            "num_approximated": sum(is_token),
            "num_in_common": len(self.shared),
            "tensors": {
                target.name: self._judged(target, found[target.name], is_token)
                for target in planned.targets
            },
        }

    def _judged(self, target: Target, found: _Found, is_token: Sequence[bool]) -> dict[str, Any]:
        pairs = zip(is_token, found.has_basis, strict=True)
        worst = sorted(found.errors.items(), key=lambda pair: -pair[1])[:_NUM_WORST]
        rows = [self.planned.missing[place] for place, _ in worst]
        return {
            "donor_tensor": target.donor.name if target.donor is not None else None,
            "num_without_basis": sum(one and not has for one, has in pairs),
            "reconstruction": _spread([*found.errors.values()], (0.5, 0.9, 1.0)),
            "worst": [
                {
                    "token": self.planned.tokens[row],
                    "text": self._text(row),
                    "error": round(error, 6),
                }
                for row, (_, error) in zip(rows, worst, strict=True)
            ],
            "held_out": self._held_out(target, found),
        }

    def _text(self, row: int) -> str:
        return self.planned.donor.text_of(row, self.planned.tokens[row])

    def _held_out(self, target: Target, found: _Found) -> dict[str, Any] | None:
        """Compare rows that were left out with what they would have been made into."""
        import torch

        if found.held_out is None:
            return None
        own, rows, weights = found.held_out
        columns = target.source.num_elements // _num_rows(target.source)

        def values(name: str, copied: Sequence[int], sums: Sums | None = None) -> Tensor:
            made = CombinedRows(
                name=target.name, shape=(len(own), columns), out_dtype=DTYPES["float64"],
                dtype=DTYPES["float64"], source=target.source, copied=copied, basis=name, sums=sums,
            )  # fmt: skip
            found = self.reader.values(made, 0, made.num_elements).view(len(own), columns)
            self.reader.release([(0, made)])
            return found

        true = values("held out", own)
        made = values("made", copies([None] * len(own)), Sums.of(rows, weights))
        mean = values("mean", copies([None] * len(own)), Sums.of(*_means([[]] * len(own))))
        lengths = true.norm(dim=1)
        if not bool((lengths > 0).any()):
            return None
        true, made, mean = (each[lengths > 0] for each in (true, made, mean))
        lengths = lengths[lengths > 0]
        cosines = torch.nn.functional.cosine_similarity(true, made, dim=1).tolist()
        errors, of_mean = ((each - true).norm(dim=1) / lengths for each in (made, mean))
        return {
            "num_tokens": len(cosines),
            "cosine": _spread(cosines, (0.5, 0.1, 0.0)),
            "error": _spread(errors.tolist(), (0.5, 0.9, 1.0)),
            "error_of_mean": _spread(of_mean.tolist(), (0.5, 0.9, 1.0)),
        }

    def notes(self, found: Mapping[str, _Found], report: Mapping[str, Any]) -> list[str]:
        """Return what a person should know of the rows."""
        planned, notes = self.planned, []
        lost: dict[int, str] = {}
        for one in found.values():
            for row, has in zip(planned.missing, one.has_basis, strict=True):
                if row in planned.tokens and not has:
                    lost[row] = self._text(row)
        if lost:
            some = ", ".join(quoted(text) for text in [*lost.values()][:_NUM_SHOWN])
            more = ", …" if len(lost) > _NUM_SHOWN else ""
            notes.append(
                f"nothing tells what the rows of {len(lost):,} token(s) are ({some}{more}): they "
                "are the mean of the model's rows"
            )
        if len(self.shared) < self.spec.k <= len(planned.pairing.shared):
            notes.append(
                f"k is {self.spec.k}, but of the {len(planned.pairing.shared):,} tokens in common "
                f"only {len(self.shared):,} have rows that are finite and not zero: all of them "
                "are used"
            )
        poor = [
            f"{shown(name)} {held['error']['median']:.2f}, "
            f"the mean {held['error_of_mean']['median']:.2f}"
            for name, of in report["tensors"].items()
            if (held := of["held_out"]) is not None
            if held["error"]["median"] >= held["error_of_mean"]["median"]
        ]
        if poor and self.spec.approximation != "mean":
            notes.append(
                "rows of tokens in common that were held out came out no better than the mean of "
                f"all rows would (median errors: {'; '.join(poor)}): the new rows may be "
                "no better either. Compare the methods by this error"
            )
        return notes


def _num_rows(source: Source) -> int:
    """Return how many tokens a vocabulary tensor has; a bias (1, V) has them along its columns."""
    is_row = len(source.shape) == 2 and source.shape[0] == 1
    return source.shape[1] if is_row else source.shape[0]


def _means(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return sums (S, K) that are means of rows; of no rows, the mean of all."""
    import torch

    longest = max(map(len, ids), default=0) or 1
    rows = torch.full((len(ids), longest), MEAN)
    weights = torch.zeros(len(ids), longest, dtype=torch.float64)
    for place, own in enumerate(ids):
        used = own or [MEAN]
        rows[place] = used[0]
        rows[place, : len(used)] = torch.tensor(used)
        weights[place, : len(used)] = 1 / len(used)
    return rows, weights


def _spread(values: Sequence[float], shares: tuple[float, float, float]) -> dict[str, Any] | None:
    """Return quantiles of values by their names; None if there are no values."""
    import torch

    if not values:
        return None
    names = {0.0: "min", 0.1: "p10", 0.5: "median", 0.9: "p90", 1.0: "max"}
    found = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor(shares, dtype=torch.float64)
    )
    return {names[share]: round(float(v), 6) for share, v in zip(shares, found, strict=True)}
