"""The README, the pages of `docs/` and the notebook: commands, links, the reference, the site."""

from __future__ import annotations

import doctest
import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
import transformers
import yaml
from documents import NOT_RUN, PAGES, ROOT, blocks, commands, make_place

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.cli.main import COMMANDS
from outliermerge.methods.table import METHODS
from outliermerge.spec.check import load_spec
from outliermerge.spec.moe import load_moe_spec
from outliermerge.spec.schema import json_schema

sys.path.insert(0, str(ROOT / "docs"))
import reference

README = ROOT / "README.md"
NOTEBOOK = ROOT / "examples" / "first_merge.ipynb"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Path:
    """A folder with the models and files that the pages name."""
    folder = tmp_path_factory.mktemp("documents")
    make_place(folder, warm)
    return folder


@pytest.fixture(scope="module")
def have_run() -> set[str]:
    """Commands that a page had before, in the same folder."""
    return set()


# Commands, files and Python


@pytest.mark.filterwarnings("default")  # as in a shell
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_every_command_of_a_page_runs(
    page, place, have_run, in_process, request, monkeypatch, capsys
):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("PATH", f"{place / 'bin'}:{Path(sys.executable).parent}", prepend=":")
    if any(command.startswith("outliermerge eval ") for command in commands(page)):
        monkeypatch.setattr(sys, "executable", str(request.getfixturevalue("warm")))
    for command in commands(page):
        if command.startswith(NOT_RUN) or command in have_run:
            continue
        assert re.match(r"(\w+=\S+ )?outliermerge(-mergekit)? ", command), command
        program, *arguments = shlex.split(command)
        if page == README or program != "outliermerge" or ">" in arguments:
            done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
            code, said = done.returncode, done.stderr
        else:  # starting a process for each would take most of the time
            code, said = cli.main(arguments), capsys.readouterr().err
        assert code == 0, f"{command}\n{said}"
        have_run.add(command)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft reads it
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_the_python_of_a_page_runs(page, place, monkeypatch):
    monkeypatch.chdir(place)
    w = torch.zeros(4)
    a, b = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
    space = {name: getattr(outliermerge, name) for name in outliermerge.__all__} | {"torch": torch}
    space |= {"w": w, "a": a, "b": b, "base": {"w": w}, "tuned_a": {"w": a}, "tuned_b": {"w": b}}
    if "get_peft_model" in page.read_text():
        space["model"] = transformers.AutoModelForCausalLM.from_pretrained("models/base")
    for block in blocks(page, "python"):
        exec(compile(block.text, str(page), "exec", dont_inherit=True), space)
    if "tensor" in space:
        assert torch.equal(space["tensor"], torch.tensor([0.5, 0.7, 0, 0]))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name_of)
def test_the_yaml_of_a_page_has_keys_of_specs(page, place, monkeypatch):
    monkeypatch.chdir(place)
    for block in blocks(page, "yaml"):
        document = yaml.safe_load(block.text)
        if block.file == "space.yaml":  # of a search, which the page's command reads
            continue
        if "experts" in document:
            load_moe_spec(document)
            continue
        assert document.keys() <= json_schema()["properties"].keys()
        if "merge_method" in document and ":" not in document["merge_method"]:
            load_spec(document)


def test_every_file_of_a_page_is_used_and_has_one_text():
    found = [(block.file, block.text) for page in PAGES for block in blocks(page, "yaml", "python")]
    named = dict(filter(lambda pair: pair[0], found))
    assert len(named) == len(set(filter(lambda pair: pair[0], found)))
    used = "\n".join(command for page in PAGES for command in commands(page))
    assert all(name in used for name in named if name.endswith(".yaml"))


def test_the_pages_name_targets_and_extras_that_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z][a-z0-9-]+)", text, re.M)) <= targets
    project = (ROOT / "pyproject.toml").read_text()
    extras = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    wanted = set(re.findall(r"'\.\[([\w,-]+)\]'", text))
    assert {name for names in wanted for name in names.split(",")} <= set(
        re.findall(r"^([\w-]+) = \[", extras, re.M)
    )


# The README


def test_the_readme_is_short_and_begins_with_a_merge():
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    assert next(n for n, line in enumerate(lines) if line.startswith("merge_method:")) < 50
    assert next(n for n, line in enumerate(lines) if line.startswith("outliermerge run")) < 60
    assert {"make demo", "make test"} <= set(commands(README))


@pytest.mark.parametrize("page", reference.PAGES, ids=lambda page: page.name)
def test_what_a_page_says_of_the_code_is_so(page):
    text = page.read_text()
    assert reference.inserted(text) == text, "run: python docs/reference.py --write"


def test_the_examples_of_the_reference_are_right():
    assert doctest.testmod(reference).failed == 0


# Figures that come from elsewhere in the repository


@pytest.mark.parametrize("study", ["weights", "peft"])
def test_the_pages_show_rows_of_the_studies(study):
    pages = [ROOT / "docs" / "paper.md", ROOT / "docs" / "howto" / "adapters.md"]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    rows = [line for line in lines if re.search(r"\d ± \d", line) and line[0] == "|"]
    committed = {
        name: set((ROOT / "evals" / name / "README.md").read_text().splitlines())
        for name in ("weights", "peft")
    }
    assert len([row for row in rows if row in committed[study]]) >= 4
    assert all(any(row in lines for lines in committed.values()) for row in rows)


def test_every_figure_of_the_weights_is_shown_and_every_picture_is_there():
    shown = {
        (page.parent / path).resolve()
        for page in PAGES
        for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in shown)
    assert set((ROOT / "evals" / "weights" / "figures").iterdir()) <= shown


# Links


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_of
)
def test_every_link_of_a_page_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.parent.name != "reference":
            if (included := re.search(r"\{include\} (\S+)", target.read_text())) is not None:
                target = target.parent / included[1]
            assert anchor in anchors(target), link


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-E", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(folder / "trees"), "docs", str(folder / "html")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder / "html"


def shown(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_every_key_method_command_and_name_is_in_the_reference(site):
    schema = json_schema()
    for entry in (schema, *schema["$defs"].values()):
        text = shown(site / "reference" / "spec.html")
        assert all(key in text for key in entry["properties"])
        assert all(
            key.get("description", "").replace("`", "")[:60] in text
            for key in entry["properties"].values()
        )
    text = (site / "reference" / "methods.html").read_text()
    assert all(f'<span class="pre">{name}</span></code><a' in text for name in METHODS)
    text = shown(site / "reference" / "commands.html")
    assert all(f"usage: outliermerge {name} " in text for name in COMMANDS)
    text = (site / "reference" / "python.html").read_text()
    found = set(re.findall(r'id="outliermerge\.(?:[a-z_]+\.)*(\w+)"', text))
    assert found >= set(outliermerge.__all__)


def test_every_link_of_the_site_leads_somewhere(site):
    pages = {page: page.read_text() for page in site.rglob("*.html")}
    marks = {page: set(re.findall(r' id="([^"]+)"', text)) for page, text in pages.items()}
    for page, text in pages.items():
        for link in re.findall(r' (?:href|src)="([^"]+)"', text):
            path, _, anchor = unquote(html.unescape(link)).partition("#")
            if re.match(r"\w+:", link) or "searchindex" in path:
                continue
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            assert target.exists(), (page.name, link)
            assert not anchor or anchor in marks[target], (page.name, link)


# The notebook


def test_the_notebook_runs_and_its_outputs_are_whole(tmp_path, warm):
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert "/tmp" not in NOTEBOOK.read_text()
    text = "\n".join("".join(cell["source"]) for cell in code)
    done = subprocess.run(
        [warm, "-c", text],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert outliermerge.verify(tmp_path / "merged" / "both") == []
    assert len(re.findall(r"up +\d+%  jump +\d+%", done.stdout)) == 4
