"""What a load check keeps for the next one: the same answer, only to the same question."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import edit_json, save_llama, tune

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.output import load_findings, load_worker
from outliermerge.output.load_check import LoadCheck, Verdict


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> list[str]:
    """Return the list of what is asked; transformers answers in this process."""
    requests: list[str] = []

    def answers(self: LoadCheck) -> list[Any]:
        requests.extend(self._requests)
        return [load_worker.check_pair(*json.loads(request)) for request in self._requests]

    monkeypatch.setattr(LoadCheck, "_start", lambda self: None)
    monkeypatch.setattr(LoadCheck, "_answers", answers)
    return requests


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    base = save_llama(tmp_path / "base")
    tune(base, tmp_path / "task", seed=1)
    models = [{"model": str(tmp_path / "task")}]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}


def verdict_on(spec: dict[str, Any]) -> Verdict:
    with LoadCheck.of_plans([outliermerge.plan(spec)]) as check:
        return check.verdicts()[0]


def kept_files(own_cache: Path) -> list[Path]:
    return sorted((own_cache / "load_checks").glob("*"))


def test_the_same_question_is_asked_once(spec, asked):
    first, second = verdict_on(spec), verdict_on(spec)
    assert len(asked) == 1
    assert not first.was_known and first.is_kept and second.was_known and second.is_kept
    assert first.as_dict() == second.as_dict() and first.status == "loads"
    assert (first.num_rows, first.checked, first.tied) == (
        second.num_rows, second.checked, second.tied
    )  # fmt: skip


def other_config(place: Path) -> None:
    for name in ("base", "task"):
        edit_json(place / name / "config.json", lambda config: config.update(rope_theta=2e4))


def other_packages(place: Path) -> None:
    (place / "packages" / "transformers-99.0.dist-info").mkdir(parents=True)
    sys.path.append(str(place / "packages"))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return two folders of packages, each with another transformers; the first is imported."""
    places = [tmp_path / f"transformers-{version}" for version in ("98.0", "99.0.dev0")]
    for place in places:
        (place / f"{place.name}.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, *map(str, places)])
    return places


def other_order(places: list[Path]) -> None:
    sys.path[-2:] = reversed(sys.path[-2:])


def installed_again(places: list[Path]) -> None:
    """As pip does it: another commit may have the version of the one before."""
    folder = places[1] / f"{places[1].name}.dist-info"
    before = folder.stat().st_mtime_ns
    folder.rmdir()
    folder.mkdir()
    os.utime(folder, ns=(before + 1000, before + 1000))  # clocks of file systems may be coarse


@pytest.mark.parametrize("change", [other_order, installed_again])
def test_other_packages_of_the_same_names_are_asked(change, installed, spec, asked):
    verdict_on(spec)
    assert verdict_on(spec).was_known
    change(installed)
    assert not verdict_on(spec).was_known and len(asked) == 2


@pytest.mark.parametrize("change", [other_config, other_packages])
def test_another_question_is_asked(change: Callable[[Path], None], spec, asked, tmp_path):
    verdict_on(spec)
    before = list(sys.path)
    try:
        change(tmp_path)
        assert not verdict_on(spec).was_known
    finally:
        sys.path[:] = before
    assert len(asked) == 2


@pytest.mark.parametrize("damage", [b"", b"[]", None, "last"])
def test_damaged_files_are_asked_again_and_replaced(damage, spec, asked, own_cache):
    verdict_on(spec)
    (path,) = kept_files(own_cache)
    whole = path.read_bytes()
    flipped = bytes([*whole[:-9], whole[-9] ^ 1, *whole[-8:]])
    path.write_bytes(
        {None: whole[:-5], "last": flipped}[damage] if not isinstance(damage, bytes) else damage
    )
    assert verdict_on(spec).status == "loads" and len(asked) == 2
    assert kept_files(own_cache) == [path] and path.read_bytes() == whole


def test_what_stood_in_the_way_is_not_kept(spec, asked, own_cache, monkeypatch):
    monkeypatch.setattr(load_worker, "_load", lambda *_: exec("raise MemoryError('too little')"))
    assert not verdict_on(spec).is_kept
    assert kept_files(own_cache) == []
    monkeypatch.undo()


def test_only_the_latest_are_kept(spec, asked, own_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(load_findings, "_MOST_FILES", 2)
    for theta in (1e3, 1e4, 1e5):
        for name in ("base", "task"):
            edit_json(
                tmp_path / name / "config.json",
                lambda config, theta=theta: config.update(rope_theta=theta),
            )
        verdict_on(spec)
    assert len(kept_files(own_cache)) == 2
    assert verdict_on(spec).was_known and len(asked) == 3


def test_a_cache_that_cannot_be_written_is_done_without(spec, asked, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [verdict_on(spec).is_kept for _ in range(2)] == [False, False]
    assert len(asked) == 2


def test_a_library_used_from_its_sources_is_always_asked(spec, asked, tmp_path, monkeypatch):
    class Place:
        origin = str(tmp_path / "src" / "transformers" / "__init__.py")

    monkeypatch.setattr(load_findings, "find_spec", lambda name: Place)
    assert [verdict_on(spec).is_kept for _ in range(2)] == [False, False]
    assert len(asked) == 2


def test_a_run_after_a_plan_does_not_wait(spec, asked, tmp_path, capsys):
    file, out = tmp_path / "spec.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(spec))
    assert cli.main(["plan", str(file), "--load-check"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"\(checked in (.* s|less than a second); a run takes this answer over\)", said
    )
    assert cli.main(["run", str(file), str(out), "--load-check"]) == 0
    assert "LlamaForCausalLM: checked before, " in capsys.readouterr().out
    assert len(asked) == 1
    assert json.loads((out / "outliermerge.json").read_text())["load_check"]["status"] == "loads"
