"""Plans a mixture of experts: renamed copies of its models' tensors, and the routers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.layout import plan_layout
from outliermerge.checkpoint.made import HeldTensor, NoisyTensor
from outliermerge.checkpoint.sources import DTYPES, DType, Source
from outliermerge.errors import OutlierMergeError, listing, quoted, shown
from outliermerge.optional import installed_version
from outliermerge.planning.inputs import open_model, refuse_absent_models
from outliermerge.planning.metadata import kept_metadata
from outliermerge.planning.moe_architectures import (
    PROJECTIONS,
    MoeArchitecture,
    choose_architecture,
    mixture_config,
)
from outliermerge.planning.notes import reading_notes
from outliermerge.planning.plan import Input, Job, Plan
from outliermerge.planning.proof import prove
from outliermerge.planning.repeated import check_sizes
from outliermerge.planning.sidecars import choose_sidecars, sidecar_contents
from outliermerge.planning.stops import further_stops
from outliermerge.planning.vocabulary import Alignment
from outliermerge.spec.moe import ExpertEntry, MoeSpec
from outliermerge.spec.rename import Rename
from outliermerge.spec.settings import SpecPath
from outliermerge.spec.text import Mistakes
from outliermerge.storage.stamps import Watched, open_file, refuse_text, told_by_name, watching

DEFAULT_SHARD_BYTES = 5 * 10**9
_MATRIX = re.compile(r"(?P<layer>.*layers\.(?P<number>\d+)\.)mlp\.(?P<name>\w+)\.weight$")
_IN_LAYER = re.compile(r".*layers\.\d+\.(?P<rest>.+)$")
_OUTSIDE = re.compile(r"(.*\.)?(embed_tokens|norm|lm_head)\.weight$")
_COMPUTED = re.compile(r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_ROUTER = "the routers"


@dataclass(frozen=True)
class Mixture:
    """A plan of a mixture, whose routers may not be computed yet.

    Attributes:
        plan: its jobs make all tensors; those of the routers read `HeldTensor`s.
        architecture: of the output.
        layers: the start of the names of each layer's tensors in the base model.
        hidden_size: of the base model.
        gated: the experts that have a router, the shared one last, each with its place.
    """

    plan: Plan
    architecture: MoeArchitecture
    layers: tuple[str, ...]
    hidden_size: int
    gated: tuple[tuple[SpecPath, ExpertEntry], ...]

    @property
    def spec(self) -> MoeSpec:
        assert isinstance(self.plan.spec, MoeSpec)
        return self.plan.spec

    @property
    def base(self) -> Input:
        return self.plan.inputs[0]

    def with_routers(self, rows: Sequence[Any], notes: Sequence[str]) -> Mixture:
        """Return the mixture with its routers' values.

        Args:
            rows: for each layer an array (gated experts, hidden size) in float32.
            notes: what is to be said of them.
        """
        num_routed = len(self.spec.moe.experts)
        values = {}
        for layer, matrix in zip(self.layers, rows, strict=True):
            values[layer + self.architecture.router] = matrix[:num_routed].tobytes()
            if self.architecture.shared_router:
                values[layer + self.architecture.shared_router] = matrix[num_routed:].tobytes()
        plan = _with_values(self.plan, values)
        return replace(self, plan=replace(plan, notes=(*plan.notes, *notes)))


def plan_mixture(spec: MoeSpec, *, shard_bytes: int | None = None) -> Mixture:
    """Plan a mixture of experts from the headers of its models; the routers are computed later.

    Raises:
        OutlierMergeError: a model is absent or broken, or the models do not fit together.
    """
    if shard_bytes is None and spec.repeated is not None:
        shard_bytes = spec.repeated.shard_bytes
    with told_by_name(), watching(Watched()) as watched:
        mixture = _Planner(spec).mixture(shard_bytes or DEFAULT_SHARD_BYTES)
        for content in sidecar_contents(mixture.plan).values():
            if isinstance(content, Path):  # refuse now what cannot be written
                open_file(content).close()
    for entry in mixture.plan.inputs:
        refuse_text(entry.checkpoint.root)
    check_sizes(mixture.plan)
    plan = replace(mixture.plan, files=watched.stamps, shard_bytes=shard_bytes)
    return replace(mixture, plan=plan)


def held_values(plan: Plan) -> dict[str, bytes]:
    """Return the values of a mixture's routers by the names of their tensors."""
    sources = ((job.name, job.sources[0][1]) for job in plan.jobs)
    return {
        name: source.values
        for name, source in sources
        if isinstance(source, HeldTensor) and source.values is not None
    }


def plan_with_values(spec: MoeSpec, shard_bytes: int | None, values: Mapping[str, bytes]) -> Plan:
    """Plan a mixture whose routers were computed elsewhere.

    Args:
        values: what `held_values` returned there.
    """
    return _with_values(plan_mixture(spec, shard_bytes=shard_bytes).plan, values)


def _with_values(plan: Plan, values: Mapping[str, bytes]) -> Plan:
    jobs = []
    for job in plan.jobs:
        source = job.sources[0][1]
        if isinstance(source, HeldTensor):
            held = replace(source, values=values[job.name])
            job = replace(job, sources=((0, held),))
        jobs.append(job)
    return replace(plan, jobs=tuple(jobs))


class _Planner:
    def __init__(self, spec: MoeSpec) -> None:
        self.spec, self.moe = spec, spec.moe
        self.mistakes = Mistakes(spec.source)
        named: list[tuple[SpecPath, str]] = [(("base_model",), self.moe.base_model)]
        named += [((*path, "source_model"), e.source_model) for path, e in self.moe.models()]
        refuse_absent_models(spec.source, named)
        self.inputs: list[Input] = []
        self.numbers: dict[str, int] = {}
        for path, reference in named:
            if reference not in self.numbers:
                self._open(path, reference)
        self._refuse()
        self.configs = [read_json(entry.home / "config.json") for entry in self.inputs]

    def _open(self, path: SpecPath, reference: str) -> None:
        base = self.inputs[0] if self.inputs else None
        try:
            with told_by_name():
                entry = open_model(reference, Rename(), "model" if base else "base", base)
        except OutlierMergeError as error:
            self._wrong(path, error.marked)
            return
        self.numbers[reference] = len(self.inputs)
        self.inputs.append(entry)

    def _wrong(self, path: SpecPath, message: str) -> None:
        self.mistakes.found.append(self.spec.source.error(path, message))

    def _refuse(self) -> None:
        self.mistakes.refuse(OutlierMergeError)

    def mixture(self, shard_bytes: int) -> Mixture:
        base, config = self.inputs[0], self.configs[0]
        architecture = self._architecture()
        matrices = self._matrices(base)
        self._check_base(architecture, matrices)
        checked = set[int]()
        for path, entry in self.moe.models():
            number = self.numbers[entry.source_model]
            if number not in checked and number != 0:
                self._check_expert((*path, "source_model"), number, matrices)
            checked.add(number)
        self._refuse()
        layers = tuple(dict.fromkeys(layer for layer, _ in matrices.values()))
        layers = tuple(sorted(layers, key=lambda layer: int(layer.split(".")[-2])))
        gated = [*((("experts", i), e) for i, e in enumerate(self.moe.experts))]
        if architecture.shared_router:
            gated.append((("shared_experts", 0), self.moe.shared[0]))
        drafts = self._drafts(architecture, matrices, len(gated))
        metadata, notes = kept_metadata(self.inputs[:1])
        shards, placed = plan_layout(
            ((name, dtype, source.shape) for name, _, source, dtype, _, _ in drafts),
            shard_bytes=shard_bytes,
            components=base.checkpoint.components,
            metadata=metadata,
        )
        jobs = tuple(
            Job("merge" if scale is not None else "copy", "passthrough",
                {} if scale is None else {"scale": (scale,)},
                ((number, source),), placed[name], reason=reason)
            for name, number, source, _, scale, reason in drafts
        )  # fmt: skip
        sidecars, more = choose_sidecars(self.spec, self.inputs[:1])
        unchanged = Alignment(tuple(entry.checkpoint for entry in self.inputs), None, (), ())
        ids, stops = further_stops(self.spec, self.inputs, self.inputs, sidecars, unchanged, base)
        written = mixture_config(architecture, self.moe, config)
        proof, doubts = prove(
            base.checkpoint.tensors, {job.name: job.output.shape for job in jobs}, written, None
        )
        plan = Plan(
            spec=self.spec,
            inputs=tuple(self.inputs),
            jobs=jobs,
            shards=tuple(shards),
            sidecars=sidecars,
            gradients={},
            dropped=(),
            notes=(*notes, *more, *stops, *doubts, *self._notes(architecture)),
            checks=(),
            proof=proof,
            components=base.checkpoint.components,
            config=written,
            ids=ids,
        )
        return Mixture(plan, architecture, layers, config["hidden_size"], tuple(gated))

    def _architecture(self) -> MoeArchitecture:
        base, config = self.inputs[0], self.configs[0]
        at = ("base_model",)
        if not base.checkpoint.root.is_dir() or not config:
            self._wrong(at, f"{shown(base.reference)} has no config.json, which a mixture needs")
            self._refuse()
        architecture, why = choose_architecture(self.moe, config)
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        lacking = [key for key in needed if type(own := config.get(key)) is not int or own < 1]
        if architecture is None:
            self._wrong(("architecture",) if self.moe.architecture else at, why)
        elif lacking:
            self._wrong(
                at,
                f"config.json of {shown(base.reference)} has no whole number above 0 for "
                + ", ".join(lacking),
            )
        if architecture is None or lacking:
            self._refuse()
            raise AssertionError("refused")
        return architecture

    def _matrices(self, entry: Input) -> dict[str, tuple[str, str]]:
        """Return the MLP's matrices in a model, each with its layer and its name there."""
        found = {}
        for name in entry.checkpoint.tensors:
            match = _MATRIX.match(name)
            if match and match["name"] in PROJECTIONS:
                found[name] = (match["layer"], match["name"])
        return found

    def _check_base(
        self, architecture: MoeArchitecture, matrices: Mapping[str, tuple[str, str]]
    ) -> None:
        """Refuse a base with tensors that the architecture has no place for."""
        base, strange = self.inputs[0], []
        for name in base.checkpoint.tensors:
            layer = _IN_LAYER.match(name)
            if name in matrices or _COMPUTED.match(name):
                continue
            if not (layer["rest"] in architecture.attention if layer else _OUTSIDE.match(name)):
                strange.append(name)
        if strange:
            biases = any(name.endswith(".bias") for name in strange)
            what = "biases, which" if biases else "tensors, which"
            self._wrong(
                ("base_model",),
                f"{shown(base.reference)} has {what} {architecture.name} has no place for:\n"
                + listing(strange, limit=5),
            )
        number = self.configs[0]["num_hidden_layers"]
        if len(matrices) != len(PROJECTIONS) * number:
            self._wrong(
                ("base_model",),
                f"{shown(base.reference)} has {len(matrices)} MLP matrices; its config says "
                f"{number} layers, which have {len(PROJECTIONS) * number}",
            )

    def _check_expert(
        self, path: SpecPath, number: int, matrices: Mapping[str, tuple[str, str]]
    ) -> None:
        """Refuse an expert whose MLP layers are not like the base's."""
        base, expert = self.inputs[0], self.inputs[number]
        for key, usual in (("model_type", None), ("hidden_act", "silu")):
            ours, its = (self.configs[n].get(key, usual) for n in (0, number))
            if its != ours:
                said = f"{key} {quoted(its)}, the base {shown(base.reference)} has {quoted(ours)}"
                self._wrong(path, f"{shown(expert.reference)} has {said}")
        own, tensors = self._matrices(expert), expert.checkpoint.tensors
        differing = [name for name in own if name not in matrices]
        differing += [
            f"{shown(name)}: "
            + (f"{list(tensors[name].shape)}" if name in tensors else "not there")
            + f", the base has {list(source.shape)}"
            for name in matrices
            if (source := base.checkpoint.tensors[name])
            and (name not in tensors or tensors[name].shape != source.shape)
        ]
        biases = [name for name in tensors if re.match(r".*layers\.\d+\.mlp\.\w+\.bias$", name)]
        if differing:
            self._wrong(
                path,
                f"{shown(expert.reference)} has other MLP layers than the base "
                f"{shown(base.reference)}:\n{listing(differing, limit=5)}",
            )
        if biases:
            said = f"{shown(expert.reference)} has biases in its MLP layers, which no mixture holds"
            self._wrong(path, f"{said}:\n{listing(biases, limit=5)}")

    def _drafts(
        self, architecture: MoeArchitecture, matrices: Mapping[str, tuple[str, str]], num_gated: int
    ) -> list[tuple[str, int, Source, DType, float | None, str]]:
        """Return name, input, source, dtype, scale and reason of each tensor."""
        drafts: list[tuple[str, int, Source, DType, float | None, str]] = []
        with_router = set[str]()
        width, number = self.configs[0]["hidden_size"], len(self.moe.experts)
        for name, source in self.inputs[0].checkpoint.tensors.items():
            if _COMPUTED.match(name):
                continue
            dtype = DTYPES[self.moe.dtype] if self.moe.dtype else source.out_dtype
            if name not in matrices:
                drafts.append((name, 0, source, dtype, None, "the base model's"))
                continue
            layer, matrix = matrices[name]
            if layer not in with_router:
                with_router.add(layer)
                routers = [(architecture.router, number)]
                if num_gated > number:
                    routers.append((architecture.shared_router, num_gated - number))
                for inner, rows in routers:
                    held = HeldTensor(layer + inner, (rows, width), self._basis())
                    drafts.append((held.name, 0, held, dtype, None, _ROUTER))
            for path, entry in self.moe.models():
                index = int(path[1]) if path[0] == "experts" else None
                wanted = layer + architecture.matrix(matrix, index)
                input_number = self.numbers[entry.source_model]
                own = self.inputs[input_number].checkpoint.tensors[name]
                if entry.noise_scale:
                    own = NoisyTensor(
                        name=own.name, shape=own.shape, out_dtype=own.out_dtype, source=own,
                        scale=entry.noise_scale, seed=self.moe.seed, stream=f"noise of {wanted}",
                    )  # fmt: skip
                scale = entry.residual_scale if matrix == PROJECTIONS[-1] else None
                reason = "" if scale is not None else "an expert's"
                drafts.append((wanted, input_number, own, dtype, scale, reason))
        return drafts

    def _basis(self) -> str:
        """Return what the routers' values depend on besides the base model's files."""
        prompts = [[e.positive_prompts, e.negative_prompts] for _, e in self.moe.models()]
        made_by = [installed_version("transformers"), installed_version("tokenizers")]
        drawn = self.moe.gate_mode in ("random", "uniform_random")
        text = json.dumps([self.moe.gate_mode, self.moe.seed, [] if drawn else [prompts, made_by]])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _notes(self, architecture: MoeArchitecture) -> list[str]:
        """Return what a person should know of the mixture before it is made."""
        notes, experts = [*reading_notes(self.spec, self.inputs)], self.moe.experts
        if len({self.numbers[e.source_model] for e in experts}) == 1 and not any(
            e.noise_scale for e in experts
        ):
            notes.append(
                "all experts are the same model: until it is trained, the mixture answers as one "
                "expert does, and takes more memory"
            )
        if self.moe.shared and not any(e.residual_scale is not None for _, e in self.moe.models()):
            notes.append(
                f"the shared expert is added to the others, so that the MLP layers give about "
                f"{1.5 if architecture.shared_router else 2} times what they give in a dense "
                "model: `residual_scale` on the experts makes up for it"
            )
        if len(experts) & (len(experts) - 1):
            notes.append(
                f"{len(experts)} experts are no power of two: transformers loads them, some "
                "versions of llama.cpp do not"
            )
        sizes = {c["vocab_size"] for c in self.configs if isinstance(c.get("vocab_size"), int)}
        if len(sizes) > 1:
            notes.append(
                f"the models have vocabularies of {' and '.join(map(str, sorted(sizes)))} rows: "
                f"the mixture has the embeddings and the tokenizer of {self.inputs[0].reference}"
            )
        return notes
