"""Tables at every width: no name is broken, and layers are in the order of their numbers."""

from __future__ import annotations

import io
import re

import pytest
import torch
from checkpoints import save_tensors
from rich.console import Console

from outliermerge.cli.main import main
from outliermerge.cli.tables import NamedTable, print_facts, print_words, short_references

NUM_LAYERS = 12
LONG = "language_model.model.layers.{}.self_attention_of_a_long_name.k_proj.weight"
NAMES = [LONG.format(layer) for layer in range(NUM_LAYERS)] + ["lm_head.weight"]
WIDTHS = (40, 80, 120, 300)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a-folder-with-a-rather-long-name") / "another-folder-inside"
    found = {}
    for number, name in enumerate(("base", "tuned-a", "tuned-b")):
        generator = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(40, 30, generator=generator) for name in NAMES}
        found[name] = str(save_tensors(folder / name, tensors))
    spec = folder / "spec.yaml"
    spec.write_text(
        "merge_method: ties\n"
        f"base_model: {found['base']}\n"
        f"models:\n- model: {found['tuned-a']}\n- model: {found['tuned-b']}\n"
    )
    return found | {"spec": str(spec)}


COMMANDS = {
    "plan": ["plan", "{spec}", "--no-load-check"],
    "plan --tensors": ["plan", "{spec}", "--no-load-check", "--tensors"],
    "stats": ["stats", "{tuned-a}", "--base", "{base}"],
    "stats --by layer": ["stats", "{tuned-a}", "--base", "{base}", "--by", "layer"],
    "stats --by tensor": ["stats", "{tuned-a}", "--by", "tensor"],
    "compare-weights": ["compare-weights", "{tuned-a}", "{tuned-b}", "--base", "{base}"],
    "compare-weights of three": ["compare-weights", "{tuned-a}", "{tuned-b}", "{base}"],
    "compare-weights --by layer": [
        "compare-weights", "{tuned-a}", "{tuned-b}", "--base", "{base}", "--by", "layer",
    ],
    "compare-weights --by module": [
        "compare-weights", "{tuned-a}", "{tuned-b}", "--base", "{base}", "--by", "module",
    ],
    "compare-weights --by tensor": [
        "compare-weights", "{tuned-a}", "{tuned-b}", "--by", "tensor",
    ],
    "layers": ["layers", "{tuned-a}", "{tuned-b}", "--values", "4"],
}  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_name_is_printed_whole(models, monkeypatch, capsys, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([part.format(**models) for part in COMMANDS[command]]) == 0
    printed = capsys.readouterr().out
    for name, model in models.items():
        if name != "spec" and "{" + name + "}" in COMMANDS[command]:
            assert model in printed
    if "tensor" in command:
        assert all(name in printed for name in NAMES)
    if "layer" in command and "layers" not in command:
        assert all(f"language_model.model.layers.{n}\n" in printed.replace(" ", "\n")
                   for n in range(NUM_LAYERS))  # fmt: skip


@pytest.mark.parametrize("width", (80, 120))
@pytest.mark.parametrize("command", COMMANDS)
def test_only_names_make_lines_longer_than_the_terminal(
    models, monkeypatch, capsys, command, width
):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([part.format(**models) for part in COMMANDS[command]]) == 0
    for line in capsys.readouterr().out.splitlines():
        longest = max(map(len, line.split()), default=0)
        assert len(line) <= max(width, longest + 40), line


@pytest.mark.parametrize(
    "command", ["stats --by layer", "stats --by tensor", "compare-weights --by layer",
                "compare-weights --by tensor"],
)  # fmt: skip
def test_layers_are_in_the_order_of_their_numbers(models, capsys, command):
    assert main([part.format(**models) for part in COMMANDS[command]]) == 0
    printed = capsys.readouterr().out
    numbers = [int(n) for n in re.findall(r"(?m)^language_model\.model\.layers\.(\d+)", printed)]
    assert numbers == list(range(NUM_LAYERS))


def _printed(width, show) -> list[str]:
    file = io.StringIO()
    show(Console(file=file, width=width, color_system=None))
    return file.getvalue().splitlines()


def test_a_name_that_does_not_fit_has_a_line_of_its_own():
    table = NamedTable("name", "a", "b")
    table.add_row("short", "1", "22")
    table.add_row("x" * 30, "333", "4")
    assert _printed(80, table.print)[2] == "x" * 30 + "  333   4"
    assert _printed(30, table.print) == [
        "name     a   b",
        "short    1  22",
        "x" * 30,
        "       333   4",
    ]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_table_of_few_rows_is_printed(rows):
    table = NamedTable("name", "value")
    for _ in range(rows):
        table.add_row("a", "1")
    assert len(_printed(5, table.print)) == 1 + rows


def test_wide_signs_are_counted_as_wide():
    table = NamedTable("name", "a")
    table.add_row("模型", "1")
    table.add_row("abcd", "2")
    assert _printed(80, table.print)[1:] == ["模型  1", "abcd  2"]


def test_facts_and_words_break_between_words_only():
    path = "/a/very-long/path/that-does-not/fit/into-the-line"
    lines = _printed(30, lambda console: print_facts(console, [("output", f"is {path} there")]))
    assert path in "\n".join(lines)
    assert lines[1].startswith("        ")
    lines = _printed(30, lambda console: print_words(console, f"some words and {path}\n  {path}"))
    assert [line.strip() for line in lines].count(path) == 2


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["a"], ["a"]),
        (["x/a", "x/b"], ["a", "b"]),
        (["x/a", "y/a"], ["x/a", "y/a"]),
        (["x/a/", "y/b"], ["a", "b"]),
        (["x/1/m", "x/2/m", "y/n"], ["1/m", "2/m", "y/n"]),
        ([], []),
    ],
)
def test_models_are_named_as_shortly_as_tells_them_apart(given, wanted):
    assert list(short_references(given).values()) == wanted
