"""A killed run whose rows go by token goes on, and ends in the bytes of an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest
from vocabularies import save_family
from waiting import LIMIT_SECONDS, held, stopped

from outliermerge.cli import main as cli

SPECS = {
    "union": "{pad_to_multiple_of: 64, tokens: {<new>: {source: {kind: zero}}}}",
    "a model's": "{source: other}",
}
NUM_TENSORS = 12
NUM_MOMENTS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A base and models with other tokens, a spec a tokenizer, and its undisturbed output."""
    root = save_family(tmp_path_factory.mktemp("kill"), "byte-level BPE")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for number, tokenizer in enumerate(SPECS.values()):
            Path(f"{number}.yaml").write_text(
                "merge_method: ties\nbase_model: base\n"
                "models:\n- model: chat\n- model: other\n"
                f"parameters: {{density: 0.6}}\nchat_template: chatml\ntokenizer: {tokenizer}\n"
            )
            assert cli.main(_arguments(number, Path(f"undisturbed{number}"))) == 0
    return root


def _arguments(number: int, output: Path) -> list[str]:
    run = ["run", f"{number}.yaml", "--output", str(output), "--no-load-check", "--threads", "1"]
    return [*run, "--shard-size", "20KB"]


def _killed(root: Path, number: int, output: Path, line: int, when: str) -> None:
    command = held(line, when, *_arguments(number, output))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=root, **quiet)
    assert stopped(process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=LIMIT_SECONDS)
    assert not output.exists()


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=() if moment in (0, 3, 5) else pytest.mark.faults)
        for moment in range(NUM_MOMENTS)
    ],
)
@pytest.mark.sampled(2)
def test_a_killed_run_goes_on_with_the_same_rows_and_tokens(models, tmp_path, monkeypatch, moment):
    chance, number, output = random.Random(moment), moment % 2, tmp_path / "out"
    line = 1 + int(NUM_TENSORS * (moment + chance.random() * 0.9) / NUM_MOMENTS)
    _killed(models, number, output, line, chance.choice(["before", "after"]))
    monkeypatch.chdir(models)
    assert cli.main(_arguments(number, output)) == 0
    found, expected = _bytes(output), _bytes(models / f"undisturbed{number}")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert cli.main(["verify", str(output)]) == 0


def test_a_run_does_not_go_on_where_tokens_have_moved_since(models, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    path = models / "chat" / "tokenizer.json"
    before = path.read_text()
    _killed(models, 0, output, NUM_TENSORS, "after")
    content = json.loads(before)
    entries = content["added_tokens"]
    first, second = (next(e for e in entries if e["content"] == f"<|im_{end}|>")
                     for end in ("start", "end"))  # fmt: skip
    first["content"], second["content"] = second["content"], first["content"]
    path.write_text(json.dumps(content))
    monkeypatch.chdir(models)
    try:
        assert cli.main(_arguments(0, output)) == 1
        said = capsys.readouterr().err
        assert "was begun by another merge" in said and "tokenizers) changed since" in said
        assert not output.exists()
    finally:
        path.write_text(before)
    assert cli.main(_arguments(0, output)) == 0
    assert (output / "tokenizer.json").read_bytes() == (
        models / "undisturbed0" / "tokenizer.json"
    ).read_bytes()
