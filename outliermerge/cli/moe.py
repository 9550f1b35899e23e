"""`moe`: make a mixture of experts of dense models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outliermerge.cli.in_parts import (
    add_part,
    add_ray,
    carried_out,
    check_ray,
    resolved,
    run_one_part,
)
from outliermerge.cli.lines import human_bytes
from outliermerge.cli.mergekit_flags import add_mergekit_flags, note_of
from outliermerge.cli.parts import (
    BAR_EXPLAINED,
    Command,
    add_running,
    print_json,
    print_notes,
    run_options,
)
from outliermerge.cli.specs import STANDARD_INPUT, named_output, read_standard_input
from outliermerge.cli.tables import NamedTable, print_facts, print_words, short_references
from outliermerge.cli.terminal import MergeBar, check_loading, open_console, print_result, status

if TYPE_CHECKING:
    from rich.console import Console

    from outliermerge.execution.routers import Routing
    from outliermerge.planning.moe import Mixture
    from outliermerge.planning.plan import Options
    from outliermerge.spec.moe import MoeSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a merge, and those of a mixture."""
    add_running(
        parser,
        spec="a YAML file with `base_model` and `experts`, as mergekit-moe reads it; the "
        "outliermerge.json of a mixture, to make it again; or - for the standard input",
    )
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="go on over unknown keys, as mergekit-moe does, and warn of them",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be made, without computing the routers or writing anything",
    )
    parser.add_argument(
        "--routing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show to which experts the prompts are routed (default); it takes a forward pass",
    )
    add_part(parser)
    add_ray(parser)
    add_mergekit_flags(parser)
    for flag in (
        "load-in-4bit",
        "load-in-8bit",
        "i-understand-this-is-not-useful-without-training",
    ):
        parser.add_argument(f"--{flag}", action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Make a mixture, and print what was done and where its routers send the prompts."""
    from outliermerge import api
    from outliermerge.execution.routers import add_routers
    from outliermerge.output.run import output_path, refuse_taken

    if options.cuda and options.device == "cpu":
        options.device = "cuda"
    output = named_output(options)
    mixture = api.plan_moe(_read_spec(options), shard_size=options.shard_size)
    check_ray(options)
    chosen = resolved(options, mixture.plan)
    notes = note_of(options)
    if options.dry_run:
        verdict = None
        if options.load_check:
            verdict = check_loading(mixture.plan, quiet=options.quiet)
        notes += [*mixture.plan.notes, *(verdict.notes if verdict else ())]
        named = output or mixture.spec.moe.output
        if options.json:
            facts = {"output": named, "architecture": mixture.architecture.name}
            checked = {"load_check": verdict.as_dict()} if verdict else {}
            print_json(facts | checked | mixture.plan.as_dict(tensors=False) | {"notes": notes})
        else:
            _print_plan(open_console(), mixture, named, chosen, verdict.by if verdict else ())
        print_notes(notes, options)
        return 0
    path = output_path(mixture.plan, output)
    refuse_taken(mixture.plan, path, overwrite=options.overwrite)
    if options.part:
        with status("computing the routers", quiet=options.quiet):
            mixture, _ = add_routers(mixture, device=chosen.device, show_routing=False)
        return run_one_part([(mixture.plan, path)], options, notes=notes)
    device = "cpu" if options.executor_name == "ray" else chosen.device
    with status("computing the routers", quiet=options.quiet):
        mixture, routing = add_routers(mixture, device=device, show_routing=options.routing)
    on_ray = options.executor_name == "ray"
    with MergeBar(mixture.plan.work_bytes, 1, quiet=options.quiet, on_ray=on_ray) as bar:
        asked = run_options(options, on_progress=bar.advance, on_waiting=bar.wait)
        (result,) = carried_out([(mixture.plan, path)], asked, options)
        bar.done()
    notes += [*mixture.plan.notes, *(result.load_check.notes if result.load_check else ())]
    if options.json:
        print_json(result.as_dict() | {"routing": routing and routing.as_dict(), "notes": notes})
    elif not options.quiet:
        print_result(result)
        if routing is not None:
            _print_routing(open_console(), mixture, routing, by_layer=bool(options.verbose))
    print_notes(notes, options)
    return 0


def _read_spec(options: argparse.Namespace) -> MoeSpec:
    from dataclasses import replace

    from outliermerge.spec.moe import load_moe_spec, parse_moe_spec

    if options.spec == STANDARD_INPUT:
        text = read_standard_input()
        spec = parse_moe_spec(text, file="standard input", lenient=options.lenient)
    else:
        spec = load_moe_spec(options.spec, lenient=options.lenient)
    if options.random_seed is None:
        return spec
    return replace(spec, moe=spec.moe.model_copy(update={"seed": options.random_seed}))


def _names(mixture: Mixture) -> list[str]:
    """Return a name of each expert: its number and its model."""
    experts = [entry.source_model for entry in mixture.spec.moe.experts]
    short = short_references(list(dict.fromkeys(experts)))
    return [f"{number}: {short[reference]}" for number, reference in enumerate(experts)]


def _print_plan(
    console: Console,
    mixture: Mixture,
    output: str | None,
    options: Options,
    loads_in: Sequence[str],
) -> None:
    plan, moe = mixture.plan, mixture.spec.moe
    print_words(console, f"{mixture.architecture.name}: {mixture.spec.summary}", "bold")
    table = NamedTable("expert", "of", "prompts", "negative", "residual_scale", "noise_scale")
    for (kind, number), entry in moe.models():
        what = "expert" if kind == "experts" else "shared"
        scales = [entry.residual_scale, entry.noise_scale]
        table.add_row(
            f"{what} {number}", entry.source_model, str(len(entry.positive_prompts)),
            str(len(entry.negative_prompts)), *("–" if s is None else f"{s:g}" for s in scales),
        )  # fmt: skip
    table.left("of").print(console)
    console.print()
    base, num_layers = mixture.base.reference, len(mixture.layers)
    facts = [
        ("base", f"{base}: all but the MLP layers, and the tokenizer"),
        ("layers", f"{num_layers}, each token to {moe.experts_per_token} of {len(moe.experts)}"),
        ("routers", f"gate_mode {moe.gate_mode}"),
        ("reads", human_bytes(plan.num_read_bytes)),
        ("writes", f"{human_bytes(plan.num_written_bytes)} in {len(plan.shards)} file(s)"),
        ("parameters", f"{plan.num_parameters:,} in {len(plan.jobs)} tensors; the base has "
                       f"{plan.proof.num_reference_parameters:,}"),
        ("memory", f"{human_bytes(plan.block_memory_bytes(options))} for blocks, besides the "
                   "program and the forward pass for the routers"),
        *([("loads in", "; ".join(loads_in))] if loads_in else []),
        ("output", output or "not named yet: give it after the file"),
    ]  # fmt: skip
    print_facts(console, facts)


def _print_routing(console: Console, mixture: Mixture, routing: Routing, *, by_layer: bool) -> None:
    """Print the share of tokens and the mean weight of each expert, for each expert's prompts."""
    names = _names(mixture)
    whole = len(routing.tokens)
    of_layers = [("", routing.tokens, routing.weights)]
    if by_layer:
        of_layers = [
            (f"layer {number}, ", routing.tokens[number : number + 1],
             routing.weights[number : number + 1])
            for number in range(whole)
        ]  # fmt: skip
    print_words(
        console,
        "\nWhere the routers send the prompts: share of tokens, and mean weight in brackets"
        + ("" if by_layer else f", over {whole} layers (-v: each layer)"),
        "bold",
    )
    for title, tokens, weights in of_layers:
        table = NamedTable(f"{title}prompts of", "tokens", *(f"to {n}" for n in range(len(names))))
        for number, name in enumerate(names):
            cells: list[Any] = [
                f"{100 * _mean(tokens, number, to):.0f}% ({_mean(weights, number, to):.2f})"
                for to in range(len(names))
            ]
            table.add_row(name, str(routing.num_tokens[number]), *cells)
        table.print(console)


def _mean(values: list[list[list[float]]], of: int, to: int) -> float:
    return sum(layer[of][to] for layer in values) / len(values)


COMMAND = Command(
    summary="make a mixture of experts of dense models, from a file for mergekit-moe",
    examples=(
        "outliermerge moe moe.yaml mixture",
        "outliermerge moe moe.yaml --dry-run",
        "outliermerge moe moe.yaml mixture --json",
        "outliermerge moe moe.yaml mixture --part 1/4",
        "outliermerge moe moe.yaml mixture --lenient --device cuda --no-routing",
    ),
    overview="outliermerge moe moe.yaml mixture",
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
    explanation="""\
A file names the models, and prompts for each expert, of which its router is made:
  base_model: models/base
  gate_mode: hidden
  experts:
    - source_model: models/chat
      positive_prompts: ["Hello, how are you?"]
    - source_model: models/maths
      positive_prompts: ["What is 3 times 7?"]
`gate_mode: random` needs no prompts.
gate_mode hidden and the routing need torch and transformers, for a forward pass of the base model
over the prompts with one of its layers at a time in memory, in float32; --memory does not count
that.
"""
    + BAR_EXPLAINED,
)
