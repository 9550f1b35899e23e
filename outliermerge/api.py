"""The library: plan, run and verify merges of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.arguments import checked, wrong
from outliermerge.checkpoint.layout import parse_bytes
from outliermerge.display import short_repr
from outliermerge.errors import ArgumentError, argument, quoted, suggest
from outliermerge.execution.routers import Routing, add_routers
from outliermerge.execution.transplant import add_rows
from outliermerge.output.estimate import Estimate, estimate_run
from outliermerge.output.manifest import verify_folder
from outliermerge.output.names import Final, as_final, output_here
from outliermerge.output.options import RunOptions, showing_options
from outliermerge.output.run import RunResult, output_path, refuse_taken, run_plans
from outliermerge.planning.moe import Mixture, plan_mixture
from outliermerge.planning.plan import Plan
from outliermerge.planning.planner import make_plan
from outliermerge.planning.transplant import Transplant, plan_transplant
from outliermerge.spec.check import MergeSpec, load_spec
from outliermerge.spec.moe import MoeSpec, load_moe_spec
from outliermerge.spec.transplant import DEFAULT, DEFAULT_K, TransplantSpec, transplant_spec
from outliermerge.storage.machine import num_threads


@checked
def plan(
    spec: str | Path | Mapping[str, Any] | MergeSpec,
    *,
    shard_size: int | str | None = None,
    lenient: bool = False,
) -> Plan:
    """Plan a merge without reading a tensor.

    Args:
        spec: a YAML file, the same as a dict, or the manifest of an output, whose merge is planned
            again.
        shard_size: most bytes of a weight file, such as "5GB", the default.
        lenient: go on without what mergekit passes over in silence, such as unknown keys and
            filters that no tensor matches, and warn of it in the plan's notes.

    Raises:
        SpecError: the spec is wrong.
        ArgumentError: `shard_size` is no size.
        OutlierMergeError: a model is absent or broken, or the models do not fit together.

    Example:
        >>> import outliermerge
        >>> outliermerge.plan("merge_configs/minilm_ties.yaml").jobs  # doctest: +SKIP
    """
    loaded = spec if isinstance(spec, MergeSpec) else load_spec(spec, lenient=lenient)
    if shard_size is None:
        return make_plan(loaded)
    return make_plan(loaded, shard_bytes=parse_bytes(str(shard_size), "shard_size"))


@checked
@showing_options
def run(
    spec: str | Path | Mapping[str, Any] | Plan,
    *,
    output: str | Path | None = None,
    shard_size: int | str | None = None,
    lenient: bool = False,
    keep: Sequence[str] = (),
    options: RunOptions | None = None,
    **changes: Any,
) -> RunResult:
    """Merge checkpoints into a new model folder.

    A run that was killed goes on where it stopped when it is started again, and gives the same
    bytes. The output has its name only when it is complete. In a notebook a bar shows how far it
    is.

    Args:
        spec: a YAML file, the same as a dict, the manifest of an output, or a plan.
        output: the folder or .safetensors file to write, or the address of a folder in a store,
            such as "s3://bucket/merged"; the spec's `output` by default.
        shard_size: most bytes of a weight file, 5GB by default; not with a plan.
        lenient: as for `plan`; it changes nothing about a plan.
        keep: names of stages that are written, too, each beside the output, as OUTPUT-NAME.
        options: how it is carried out.
        **changes: single fields of `RunOptions`: device, memory, threads, kernels, overwrite,
            fresh, allow_non_finite, on_progress, on_waiting, executor, and load_check, which is
            False by default: `load_check=True` proves that the output loads.

    Returns:
        What was written: `output`, `manifest`, times, and `load_check` where it was asked for.

    Raises:
        SpecError: the spec is wrong.
        ArgumentError: an argument is wrong.
        OutlierMergeError: a model or the output folder is not fit for it, or the output would
            not load.

    Example:
        >>> import outliermerge
        >>> outliermerge.run("merge_configs/minilm_ties.yaml", output="merged")  # doctest: +SKIP
    """
    chosen = RunOptions.of(options, changes)
    if isinstance(spec, Plan):
        if shard_size is not None:
            raise ArgumentError("shard_size: the plan has its shards already; give it to plan()")
        planned = spec
    else:
        planned = plan(spec, shard_size=shard_size, lenient=lenient)
    return run_plans(plans_of(planned, output, keep), chosen)[0]


def plans_of(
    planned: Plan, output: str | Path | None, keep: Sequence[str]
) -> list[tuple[Plan, Final]]:
    """Return a plan and those of stages that are written, too, each with its output.

    Raises:
        SpecError: no output is named.
        ArgumentError: the merge has no such stage, or the output has a wrong name.
    """
    stages, final = planned.spec.all_stages, output_path(planned, output)
    found: list[tuple[Plan, Final]] = [(planned, final)]
    for name in dict.fromkeys(keep):
        if name not in stages:
            advice = suggest(name, stages) if stages else "The spec has no `stages`."
            raise ArgumentError(f"{argument('keep')}: no stage {quoted(name)}. {advice}")
        if "/" in name or "\\" in name:
            raise ArgumentError(
                f"{argument('keep')}: the stage {quoted(name)} is written as OUTPUT-NAME, and its "
                "name has a slash. Give it another name"
            )
        stage = make_plan(stages[name], shard_bytes=planned.shard_bytes)
        found.append((stage, _beside(final, name, is_one_file=planned.is_one_file)))
    return found


def _beside(final: Final, name: str, *, is_one_file: bool) -> Final:
    """Return where a stage is written, beside the output."""
    if isinstance(final, str):
        return as_final(f"{final}-{name}")
    if is_one_file:
        return final.with_name(f"{final.stem}-{name}{final.suffix}")
    return final.with_name(f"{final.name}-{name}")


@dataclass(frozen=True)
class MoeResult:
    """A mixture of experts that was made.

    Attributes:
        run: what was written.
        routing: where the routers send the prompts; None if there are no prompts, or it was not
            asked for.
        notes: what a person should know of it.
    """

    run: RunResult
    routing: Routing | None
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        notes = f"{len(self.notes)} note(s) in .notes" if self.notes else ""
        return short_repr(self, str(self.run.output), notes)


@checked
@showing_options
def moe(
    spec: str | Path | Mapping[str, Any] | MoeSpec,
    *,
    output: str | Path | None = None,
    shard_size: int | str | None = None,
    lenient: bool = False,
    routing: bool = True,
    options: RunOptions | None = None,
    **changes: Any,
) -> MoeResult:
    """Make a mixture of experts of dense models, from a file in mergekit-moe's form.

    Routers by prompts need transformers and torch. A forward pass of the base model holds one of
    its layers at a time, in float32; `memory` does not count it.

    Args:
        spec: a YAML file, the same as a dict, or the manifest of a mixture.
        output: the folder to write; the file's `output` by default.
        shard_size: most bytes of a weight file, 5GB by default.
        lenient: go on over unknown keys, as mergekit does, and say so in the notes.
        routing: compute where the routers send the prompts.
        options: how it is carried out.
        **changes: single fields of `RunOptions`.

    Raises:
        SpecError: the file is wrong.
        ArgumentError: an argument is wrong.
        OutlierMergeError: a model or the output folder is not fit for it, or the output would not
            load.

    Example:
        >>> import outliermerge
        >>> outliermerge.moe("moe.yaml", output="mixture").routing  # doctest: +SKIP
    """
    chosen = RunOptions.of(options, changes)
    loaded = spec if isinstance(spec, MoeSpec) else load_moe_spec(spec, lenient=lenient)
    planned = plan_moe(loaded, shard_size=shard_size)
    path = output_path(planned.plan, output)
    refuse_taken(planned.plan, path, overwrite=chosen.overwrite)
    device = chosen.on_this_machine().device
    made, found = add_routers(planned, device=device, show_routing=routing)
    (result,) = run_plans([(made.plan, path)], chosen)
    checked = result.load_check.notes if result.load_check else ()
    return MoeResult(result, found, (*made.plan.notes, *checked))


def plan_moe(spec: MoeSpec, *, shard_size: int | str | None = None) -> Mixture:
    """Plan a mixture of experts from headers; its routers are not computed yet."""
    if shard_size is None:
        return plan_mixture(spec)
    return plan_mixture(spec, shard_bytes=parse_bytes(str(shard_size), "shard_size"))


@dataclass(frozen=True)
class TransplantResult:
    """A model that was given the tokenizer of another one.

    Attributes:
        run: what was written.
        report: what became of the tokens, and how good the rows are that were made, as JSON values.
        notes: what a person should know of it.
    """

    run: RunResult
    report: Mapping[str, Any]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        notes = f"{len(self.notes)} note(s) in .notes" if self.notes else ""
        counts = f"{self.report['num_copied']:,} rows copied, "
        counts += f"{self.report['num_approximated']:,} approximated"
        return short_repr(self, str(self.run.output), counts, notes)


@checked
@showing_options
def transplant(
    model: str | Path,
    donor: str | Path,
    *,
    output: str | Path,
    method: str = DEFAULT,
    k: int = DEFAULT_K,
    pad_to_multiple_of: int | None = None,
    shard_size: int | str | None = None,
    options: RunOptions | None = None,
    **changes: Any,
) -> TransplantResult:
    """Give a model the tokenizer of another one, with rows for the tokens that it lacks.

    Tokens that both have keep the model's rows, bit for bit, as do all other tensors. The donor's
    rows of the tokens in common are held in memory in float32, and the model's in its dtype;
    `memory` does not count them.

    Args:
        model: a folder, a hub id or model+adapter.
        donor: the same; for "subtokens", "mean" and "zero" a folder with a tokenizer is enough.
        output: the folder to write.
        method: how rows are made: "omp", "interpolate", "subtokens", "mean" or "zero".
        k: how many tokens in common make up a row, for "omp" and "interpolate".
        pad_to_multiple_of: rows are added until their number is a multiple of it, each the mean of
            the model's.
        shard_size: most bytes of a weight file, 5GB by default.
        options: how it is carried out.
        **changes: single fields of `RunOptions`.

    Raises:
        ArgumentError: an argument is wrong.
        OutlierMergeError: a model or the output folder is not fit for it, or the output would not
            load.

    Example:
        >>> import outliermerge
        >>> outliermerge.transplant("llama", "qwen", output="both").report  # doctest: +SKIP
    """
    chosen = RunOptions.of(options, changes)
    spec = transplant_spec(
        str(model), str(donor), method=method, k=k, pad_to_multiple_of=pad_to_multiple_of
    )
    planned = planned_transplant(spec, shard_size=shard_size)
    path = output_path(planned.plan, output)
    refuse_taken(planned.plan, path, overwrite=chosen.overwrite)
    made = add_rows(planned, device=chosen.on_this_machine().device)
    (result,) = run_plans([(made.plan, path)], chosen)
    checked = result.load_check.notes if result.load_check else ()
    assert made.plan.transplant is not None
    return TransplantResult(result, made.plan.transplant, (*made.plan.notes, *checked))


def planned_transplant(spec: TransplantSpec, *, shard_size: int | str | None = None) -> Transplant:
    """Plan a transplant from headers; its rows are not computed yet."""
    if shard_size is None:
        return plan_transplant(spec)
    return plan_transplant(spec, shard_bytes=parse_bytes(str(shard_size), "shard_size"))


@checked
@showing_options
def estimate(
    planned: Plan,
    *,
    output: str | Path | None = None,
    options: RunOptions | None = None,
    **changes: Any,
) -> Estimate:
    """Estimate how long a run of a plan takes, and how much memory the process needs for it.

    A few megabytes of the models are merged into an unnamed file on the output's disk, which takes
    a fraction of a second. What torch computes is tried only where torch is imported already.

    Args:
        planned: what `plan` returned.
        output: what would be written; the spec's `output` by default.
        options: how the plan would be carried out.
        **changes: single fields of `RunOptions`.

    Raises:
        ArgumentError: an option is wrong.

    Example:
        >>> import outliermerge
        >>> plan = outliermerge.plan("merge_configs/tiny_ties.yaml")  # doctest: +SKIP
        >>> outliermerge.estimate(plan).seconds  # doctest: +SKIP
    """
    if not isinstance(planned, Plan):
        raise wrong("planned", planned, "what plan() returned")
    chosen = RunOptions.of(options, changes).on_this_machine(planned)
    named = output or planned.spec.document.output
    return estimate_run(planned, chosen, None if named is None else as_final(named))


@checked
def verify(folder: str | Path, *, threads: int = 0, load: bool = False) -> list[str]:
    """Recompute every checksum of an output; return what differs from its manifest.

    Args:
        load: also return why the folder would not load, as far as transformers, diffusers or
            the configs tell; no weights are loaded for it.

    Raises:
        OutlierMergeError: the folder has no manifest.
    """
    path = output_here(folder)
    differences = verify_folder(path, threads=num_threads(threads))
    if load:
        from outliermerge.output.verify_load import check_folder

        differences += check_folder(path).problems
    return differences
