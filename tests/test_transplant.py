"""`tokenizer transplant`: the rows, the files, the report, mistakes, a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import load_folder
from safetensors.torch import save_file
from stopping import stopping_after
from tokenizers import AddedToken, Tokenizer
from transplants import EMBEDDINGS, HEAD, change, nearest, pairing, pursued
from vlm_replicas import save_vlm
from vocabularies import KINDS, TEXTS, save_model

import outliermerge
from outliermerge.checkpoint.tokens import read_tokens
from outliermerge.cli import tokenizer as command
from outliermerge.cli.main import main as cli
from outliermerge.cli.terminal import open_console
from outliermerge.execution import transplant as execution
from outliermerge.spec.transplant import APPROXIMATIONS

ROWS = (EMBEDDINGS, HEAD)
PAIRS = [*pairwise((*KINDS, KINDS[0])), ("Unigram", "byte-level BPE")]
CASES = [(*pair, method) for pair in PAIRS for method in ("omp", "subtokens")]
CASES += [(*PAIRS[0], method) for method in ("interpolate", "mean", "zero")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    """By a kind of tokenizer a model; with `other`, one of another language as well."""
    root = tmp_path_factory.mktemp("models")

    def of(kind: str, corpus: str = "base") -> Path:
        folder = root / f"{kind}-{corpus}".replace(" ", "-")
        if not folder.exists():
            if corpus == "base":
                save_model(folder, kind)
            else:
                save_model(folder, kind, corpus, ["<|im_end|>", "<x>"], seed=2)
        return folder

    return of


def encoded(folder: Path) -> list[Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in (*TEXTS.values(), "<|im_end|>the fox<x>")]


# What is written


@pytest.mark.parametrize(("kind", "other", "method"), CASES)
def test_all_but_the_rows_is_the_models_and_it_reads_as_the_donor(
    kind, other, method, models, in_process, tmp_path
):
    model, donor = models(kind), models(other, "other")
    result = outliermerge.transplant(model, donor, output=tmp_path / "out", method=method, k=4)
    ours, before = load_folder(tmp_path / "out"), load_folder(model)
    assert ours.keys() == before.keys()
    assert all(torch.equal(ours[name], before[name]) for name in ours if name not in ROWS)
    shared = pairing(model, donor).rows
    assert result.report["num_copied"] == len(shared) > 20
    for name in ROWS:
        assert torch.equal(ours[name][[*shared]], before[name][[*shared.values()]])
        assert len(ours[name]) == len(load_folder(donor)[name])
        assert ours[name].isfinite().all()
    assert encoded(tmp_path / "out") == encoded(donor)
    assert outliermerge.verify(tmp_path / "out", load=True) == []
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.state_dict()[EMBEDDINGS], ours[EMBEDDINGS])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (donor / file).read_bytes()
    config, its = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", donor))
    assert config["vocab_size"] == its["vocab_size"]
    assert config["eos_token_id"] == its["eos_token_id"]


@pytest.mark.parametrize(("method", "chosen_by"), [("omp", pursued), ("interpolate", nearest)])
def test_rows_are_sums_by_the_donors_rows(method, chosen_by, models, tmp_path):
    model, donor = models("BPE"), models("byte-level BPE", "other")
    result = outliermerge.transplant(model, donor, output=tmp_path / "out", method=method, k=5)
    ours, before, its = map(load_folder, (tmp_path / "out", model, donor))
    found = pairing(model, donor)
    donated, own = (list(side) for side in zip(*found.shared, strict=True))
    missing = [row for row in range(len(its[EMBEDDINGS])) if row not in found.rows]
    for name in ROWS:
        errors = []
        for row in missing:
            chosen, weights = chosen_by(its[name][row], its[name][donated], 5)
            wanted = weights @ before[name][[own[place] for place in chosen]].double()
            assert torch.allclose(ours[name][row].double(), wanted, rtol=1e-5, atol=1e-5)
            there = weights @ its[name][[donated[place] for place in chosen]].double()
            length = its[name][row].double().norm()
            errors.append(float((there - its[name][row]).norm() / length))
        said = result.report["tensors"][name]
        assert said["reconstruction"]["median"] == pytest.approx(
            torch.tensor(errors).quantile(0.5).item(), abs=1e-4
        )
        tokens = read_tokens(donor)
        worst = max(range(len(errors)), key=errors.__getitem__)
        assert said["worst"][0]["token"] == tokens[missing[worst]]
        assert said["worst"][0]["error"] == pytest.approx(errors[worst], abs=1e-5)


def test_subtokens_are_the_means_of_the_models_pieces(models, tmp_path):
    model, donor = models("BPE"), models("byte-level BPE", "other")
    outliermerge.transplant(model, donor, output=tmp_path / "out", method="subtokens")
    ours, before = load_folder(tmp_path / "out"), load_folder(model)
    ids = {token: id_ for id_, token in read_tokens(model).items()}
    there = {token: id_ for id_, token in read_tokens(donor).items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def mean(pieces: list[str]) -> torch.Tensor:
        return before[EMBEDDINGS][[ids[piece] for piece in pieces]].double().mean(0).float()

    # A word in the letters of bytes; it is cut as the model cuts texts.
    byte_of = {letter: byte for byte, letter in enumerate(_letters())}
    words = (bytes(byte_of[c] for c in t) for t in there if t.startswith("ĠÐ") and len(t) > 4)
    text = next(w for w in words if w == w.decode(errors="ignore").encode()).decode()
    token = "".join(_letters()[byte] for byte in text.encode())
    pieces = tokenizer.tokenize(text.lstrip())
    assert torch.equal(ours[EMBEDDINGS][there[token]], mean(pieces))
    # Half a letter is no text: its bytes.
    half = there["Ġà"] if "Ġà" in there else None
    if half is not None:
        assert torch.equal(ours[EMBEDDINGS][half], mean(["<0x20>", "<0xE0>"]))
    assert torch.equal(ours[EMBEDDINGS][there["Ð"]], before[EMBEDDINGS][ids["<0xD0>"]])


def _letters() -> list[str]:
    """Return the letters of all bytes, as transformers has them for GPT-2."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = bytes_to_unicode()
    return [table[byte] for byte in range(256)]


def test_a_donor_in_turned_coordinates_gives_back_the_models_own_rows(models, tmp_path):
    """With as many summands as columns, sums are exact there, and so are they here."""
    model, donor = models("byte-level BPE"), tmp_path / "donor"
    shutil.copytree(models("byte-level BPE", "other"), donor)
    there = load_folder(donor)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(5))).Q
    found = pairing(model, donor)
    for name in ROWS:
        true = torch.randn(len(there[name]), 8, generator=torch.Generator().manual_seed(6))
        true[[*found.rows]] = load_folder(model)[name][[*found.rows.values()]]
        change(donor, **{"embeddings" if name == EMBEDDINGS else "head": true @ turn})
        there[name] = true
    result = outliermerge.transplant(model, donor, output=tmp_path / "out", k=8)
    ours = load_folder(tmp_path / "out")
    for name in ROWS:
        assert torch.allclose(ours[name], there[name], atol=1e-4)
        held = result.report["tensors"][name]["held_out"]
        assert held["num_tokens"] > 20 and held["error"]["max"] < 1e-4
        assert held["cosine"]["min"] > 0.9999 and held["error_of_mean"]["median"] > 0.9


def test_rows_depend_on_neither_blocks_nor_threads(models, tmp_path, monkeypatch):
    model, donor = models("BPE"), models("byte-level BPE", "other")
    for name, rows, threads in (("a", 256, 1), ("b", 7, 3)):
        monkeypatch.setattr(execution, "block_rows", lambda columns, k, rows=rows: rows)
        outliermerge.transplant(model, donor, output=tmp_path / name, k=5, threads=threads)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


# Tokens


def test_tokens_of_other_spellings_are_paired(models):
    model, donor = models("BPE"), models("byte-level BPE", "other")
    ours = {token: id_ for id_, token in read_tokens(model).items()}
    there = {token: id_ for id_, token in read_tokens(donor).items()}
    found = pairing(model, donor)
    spelt_alike = dict(found.shared)
    assert spelt_alike[there["o"]] == ours["o"]
    assert spelt_alike[there["Ġ"]] == ours["▁"]
    assert found.rows[there["Ċ"]] == ours["<0x0A>"] and there["Ċ"] not in spelt_alike
    assert found.rows[there["<|end|>"]] == ours["</s>"]  # both end texts
    assert found.by_role == [there["<|end|>"]]
    assert there["<x>"] not in found.rows
    back = pairing(donor, model)
    assert back.rows[ours["<0x0A>"]] == there["Ċ"] and back.rows[ours["</s>"]] == there["<|end|>"]
    words = pairing(models("WordPiece"), donor).rows
    ids = {token: id_ for id_, token in read_tokens(models("WordPiece")).items()}
    assert words[there["o"]] == ids["##o"] and words[there["<|end|>"]] == ids["[SEP]"]


def _with_added(folder: Path, tokens: dict[str, bool]) -> None:
    """Add tokens to a model's tokenizer, special or not, on rows that have no token yet."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=s) for t, s in tokens.items()])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_spell_the_same_keep_their_own_rows(kind, tmp_path):
    """A tokenizer may have ` fox` as a piece and as an added token, as GPT-NeoX has of spaces."""
    for name in ("model", "donor"):
        save_model(tmp_path / name, kind, spare=3)
    tokens = read_tokens(tmp_path / "model").values()
    piece = next(t for t in tokens if len(t) > 2 and t[0] in "Ġ▁") if kind != "WordPiece" else "य"
    text = " " + piece.strip("Ġ▁")
    _with_added(tmp_path / "model", {text: False, "<tool>": True})
    _with_added(tmp_path / "donor", {text: False, "<tool>": False})
    assert {text, piece, "<tool>"} <= {*read_tokens(tmp_path / "donor").values()}
    result = outliermerge.transplant(
        tmp_path / "model", tmp_path / "donor", output=tmp_path / "out", method="zero"
    )
    assert result.report["num_approximated"] == 0
    ours, before = load_folder(tmp_path / "out"), load_folder(tmp_path / "model")
    number = len(read_tokens(tmp_path / "donor"))
    assert all(torch.equal(ours[name], before[name][:number]) for name in ROWS)


def test_older_files_of_a_tokenizer_spell_the_same(models, tmp_path):
    model, donor = models("BPE"), tmp_path / "donor"
    shutil.copytree(models("byte-level BPE", "other"), donor)
    before = pairing(model, donor)
    vocabulary = json.loads((donor / "tokenizer.json").read_text())["model"]["vocab"]
    (donor / "tokenizer.json").unlink()
    (donor / "vocab.json").write_text(json.dumps(vocabulary))
    after = pairing(model, donor)
    assert (after.rows, after.shared) == (before.rows, before.shared)


def test_rows_without_values_are_no_basis_and_their_tokens_get_the_mean(models, tmp_path):
    model, donor = models("byte-level BPE"), tmp_path / "donor"
    shutil.copytree(models("byte-level BPE", "other"), donor)
    found = pairing(model, donor)
    rows = load_folder(donor)[EMBEDDINGS]
    zero, broken = [row for row in range(len(rows)) if row not in found.rows][:2]
    (in_common, _), (infinite, _) = found.shared[:2]
    rows[zero], rows[broken], rows[in_common], rows[infinite] = 0, torch.nan, 0, torch.inf
    change(donor, embeddings=rows)
    result = outliermerge.transplant(model, donor, output=tmp_path / "out", k=4)
    ours, before = load_folder(tmp_path / "out"), load_folder(model)
    mean = before[EMBEDDINGS].double().mean(0).float()
    assert torch.equal(ours[EMBEDDINGS][zero], mean)
    assert torch.equal(ours[EMBEDDINGS][broken], mean)
    assert torch.equal(ours[EMBEDDINGS][in_common], before[EMBEDDINGS][found.rows[in_common]])
    assert result.report["num_in_common"] == len(found.shared) - 2
    assert result.report["tensors"][EMBEDDINGS]["num_without_basis"] == 2
    assert any("nothing tells what the rows of 2 token(s) are" in n for n in result.notes)
    assert not torch.equal(ours[HEAD][zero], before[HEAD].double().mean(0).float())


def test_more_summands_than_tokens_in_common_are_told(models, tmp_path):
    model, donor = models("WordPiece"), models("Unigram", "other")
    for method in ("omp", "interpolate"):
        result = outliermerge.transplant(
            model, donor, output=tmp_path / method, k=500, method=method
        )
        number = result.report["num_in_common"]
        assert any(f"only {number} tokens in common" in note for note in result.notes)


def test_padding_is_the_mean(models, tmp_path):
    model, donor = models("byte-level BPE"), models("Unigram", "other")
    outliermerge.transplant(
        model, donor, output=tmp_path / "out", method="subtokens", pad_to_multiple_of=64
    )
    ours, before = load_folder(tmp_path / "out")[HEAD], load_folder(model)[HEAD]
    number = len(read_tokens(donor))
    assert len(ours) % 64 == 0 and 0 < len(ours) - number < 64
    mean = before.double().mean(0).float()
    assert all(torch.equal(row, mean) for row in ours[number:])


# Models


def test_a_tied_head_stays_tied(models, tmp_path):
    donor = models("Unigram", "other")
    for name, stores_both in (("one", False), ("both", True)):
        model = tmp_path / name
        save_model(model, "byte-level BPE", config={"tie_word_embeddings": True})
        tensors = load_folder(model)
        tensors[HEAD] = tensors[EMBEDDINGS].clone()
        if not stores_both:
            del tensors[HEAD]
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        result = outliermerge.transplant(model, donor, output=tmp_path / f"{name}-out", k=4)
        ours = load_folder(tmp_path / f"{name}-out")
        assert ours.keys() == tensors.keys()
        assert [*result.report["tensors"]] == [EMBEDDINGS]
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-out")
        assert torch.equal(loaded.lm_head.weight, ours[EMBEDDINGS])
        if stores_both:
            assert torch.equal(ours[HEAD], ours[EMBEDDINGS])


def test_the_head_of_a_donor_that_ties_it_is_its_embeddings(models, tmp_path):
    model, donor = models("byte-level BPE"), tmp_path / "donor"
    save_model(donor, "Unigram", "other", config={"tie_word_embeddings": True})
    tensors = load_folder(donor)
    del tensors[HEAD]
    save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})
    result = outliermerge.transplant(model, donor, output=tmp_path / "out", k=4)
    of = result.report["tensors"]
    assert of[HEAD]["donor_tensor"] == of[EMBEDDINGS]["donor_tensor"] == EMBEDDINGS


def test_a_donor_may_have_other_columns_and_only_a_tokenizer(models, tmp_path):
    model, donor = models("byte-level BPE"), tmp_path / "donor"
    shutil.copytree(models("Unigram", "other"), donor)
    wide = torch.randn(len(read_tokens(donor)), 12, generator=torch.Generator().manual_seed(1))
    change(donor, embeddings=wide, head=wide.flip(0).contiguous())
    outliermerge.transplant(model, donor, output=tmp_path / "wide", k=4)
    assert load_folder(tmp_path / "wide")[EMBEDDINGS].shape == (len(wide), 8)
    (donor / "model.safetensors").unlink()
    outliermerge.transplant(model, donor, output=tmp_path / "out", method="subtokens")
    assert encoded(tmp_path / "out") == encoded(donor)
    with pytest.raises(outliermerge.OutlierMergeError, match="method='subtokens' needs only its"):
        outliermerge.transplant(model, donor, output=tmp_path / "no")


def test_biases_go_with_their_head(models, tmp_path):
    donor = models("WordPiece", "other")
    model = tmp_path / "bert"
    save_model(model, "WordPiece")
    (model / "model.safetensors").unlink()
    config = transformers.BertConfig(
        vocab_size=len(read_tokens(model)), hidden_size=8, intermediate_size=12,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(config)
    bert.cls.predictions.bias.data.normal_()
    bert.save_pretrained(model)
    outliermerge.transplant(model, donor, output=tmp_path / "out", k=3)
    ours, before = load_folder(tmp_path / "out"), load_folder(model)
    found = pairing(model, donor)
    bias, rows = "cls.predictions.bias", "bert.embeddings.word_embeddings.weight"
    assert ours[bias].shape == ours[rows].shape[:1] == (len(read_tokens(donor)),)
    assert torch.equal(ours[bias][[*found.rows]], before[bias][[*found.rows.values()]])
    assert transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").training is False
    its = load_folder(donor)[HEAD]
    row = next(row for row in range(len(its)) if row not in found.rows)
    donated, own = (list(side) for side in zip(*found.shared, strict=True))
    chosen, weights = pursued(its[row], its[donated], 3)
    wanted = float(weights @ before[bias][[own[place] for place in chosen]].double())
    assert float(ours[bias][row]) == pytest.approx(wanted, abs=1e-5)


def test_the_language_model_of_a_vision_language_model_is_meant(models, tmp_path):
    model = tmp_path / "vlm"
    save_vlm(model)
    shutil.copy(models("byte-level BPE") / "tokenizer.json", model)
    config = json.loads((model / "config.json").read_text())
    is_id = [key for key in config if key.endswith(("token_id", "token_index"))]
    for key in is_id:
        config[key] = 0
    (model / "config.json").write_text(json.dumps(config))
    donor = models("byte-level BPE", "other")
    outliermerge.transplant(model, donor, output=tmp_path / "out", method="mean")
    ours, before = load_folder(tmp_path / "out"), load_folder(model)
    changed = [name for name in ours if ours[name].shape != before[name].shape]
    assert changed and all(len(ours[name]) == len(read_tokens(donor)) for name in changed)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"]["vocab_size"] == len(read_tokens(donor))
    transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


def test_sixteen_bits_are_copied_and_rounded_once(models, tmp_path):
    model, donor = tmp_path / "model", models("byte-level BPE", "other")
    shutil.copytree(models("BPE"), model)
    tensors = {name: tensor.bfloat16() for name, tensor in load_folder(model).items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    outliermerge.transplant(model, donor, output=tmp_path / "out", method="mean")
    ours = load_folder(tmp_path / "out")
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    row = next(r for r in range(len(ours[HEAD])) if r not in pairing(model, donor).rows)
    assert torch.equal(ours[HEAD][row], tensors[HEAD].double().mean(0).bfloat16())


# A kill, the command line, the card


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("num_tensors", [0, 1, 5, 11])
def test_a_stopped_transplant_goes_on_and_gives_the_same_bytes(
    num_tensors, models, tmp_path, monkeypatch
):
    model, donor = models("BPE"), models("byte-level BPE", "other")

    def make(name: str) -> Any:
        return outliermerge.transplant(model, donor, output=tmp_path / name, k=5)

    make("whole")
    with stopping_after(monkeypatch, num_tensors), pytest.raises(KeyboardInterrupt):
        make("out")
    assert not (tmp_path / "out").exists()
    assert make("out").run.num_resumed == num_tensors
    for path in (tmp_path / "whole").iterdir():
        if path.name not in ("outliermerge.json",):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(outliermerge.OutlierMergeError, match="out"):
        make("out")


def test_the_command_prints_and_writes_what_the_rows_are_worth(
    models, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "160")
    model, donor = str(models("BPE")), str(models("byte-level BPE", "other"))
    words = ["tokenizer", "transplant", model, donor, "--no-load-check"]
    found, number = pairing(Path(model), Path(donor)), len(read_tokens(Path(donor)))
    copied, made, alike = len(found.rows), number - len(found.rows), len(found.shared)
    assert cli([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{made} approximated" in out and f"{alike} spelt alike" in out
    assert "config.json: eos_token_id 0" in out
    assert not any(tmp_path.iterdir())
    assert cli([*words, str(tmp_path / "out"), "--k", "5"]) == 0
    out = capsys.readouterr().out
    assert f"{number} tokens: {copied} copied, {made} approximated by omp\n" in out
    assert "special tokens for the same use: '<|end|>' as '</s>'" in out
    assert f"worst of {EMBEDDINGS}" in out and f"Held out: {alike // 4} tokens" in out
    assert cli([*words, str(tmp_path / "json"), "--k", "5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    report = said["transplant"]
    assert report["num_approximated"] == made and len(report["tensors"][HEAD]["worst"]) == 10
    manifest = outliermerge.read_manifest(tmp_path / "json")
    assert manifest["transplant"] == report
    card = (tmp_path / "json" / "README.md").read_text()
    assert f"{number} tokens: {copied} have the model's rows, {made} are approximated" in card
    assert f"{alike // 4} of the model's own rows that were held out" in card
    # The recipe begins with the command that makes it again, from any folder.
    again = (tmp_path / "json" / "recipe.yaml").read_text().splitlines()[1].removeprefix("#   ")
    words = again.replace("DIR", str(tmp_path / "again")).split()[1:]
    assert cli([*words, "--no-load-check", "-q"]) == 0
    names = ("model.safetensors", "config.json", "recipe.yaml")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "json" / name).read_bytes()


def test_a_dry_run_tells_what_a_plan_tells(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ["tokenizer", "transplant", str(models("BPE")), str(models("WordPiece", "other"))]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    alike = len(pairing(models("BPE"), models("WordPiece", "other")).shared)
    assert cli([*words, str(tmp_path / "out"), "--dry-run", "--no-load-check", "--k", "3"]) == 0
    said = capsys.readouterr()
    facts = {line.split("  ")[0] for line in said.out.splitlines()}
    wanted = {"output", "disk", "time", "peak memory", "parameters", "tokenizer", "ids", "k",
              "tensors", "in common", "new rows", "files carried over"}  # fmt: skip
    assert wanted <= facts
    assert "null" in said.out and "None" not in said.out  # the config has no padding any more
    assert "3 of the tokens in common make up a new row" in said.out
    assert f"note: a run would stop: {tmp_path / 'out'}" in said.err
    assert cli([*words, "--dry-run", "--no-load-check", "--json", "--k", "500"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["summary"]["num_tensors"] == 12 and told["spec"]["k"] == 500
    assert "peak_memory_bytes" in told and f"only {alike} tokens in common" in str(told["notes"])


@pytest.mark.parametrize("k", [7, 8])
def test_as_many_summands_as_columns_are_warned_of(k, models, tmp_path):
    """Any row is made exactly then; the model has 8 columns, and so has the donor."""
    result = outliermerge.transplant(
        models("BPE"), models("byte-level BPE", "other"), output=tmp_path / "out", k=k
    )
    said = [note for note in result.notes if "a row of the donor has 8 elements" in note]
    assert len(said) == (k == 8)


def test_rows_that_are_no_better_than_the_mean_are_told(models, tmp_path):
    """The rows of these models are noise, so that the donor tells nothing of the model."""
    said = {}
    for method in ("omp", "mean"):
        result = outliermerge.transplant(
            models("BPE"), models("byte-level BPE", "other"), output=tmp_path / method,
            method=method, k=7,
        )  # fmt: skip
        held = result.report["tensors"][EMBEDDINGS]["held_out"]
        assert held["error"]["median"] >= held["error_of_mean"]["median"]
        said[method] = any("no better than the mean of all rows" in note for note in result.notes)
    assert said == {"omp": True, "mean": False}


def test_tokens_are_shown_as_text(models, tmp_path, capsys):
    words = [str(models("BPE")), str(models("byte-level BPE", "other")), str(tmp_path / "out")]
    assert cli(["tokenizer", "transplant", *words, "--no-load-check", "-v"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "worst of" in line]
    assert said and not any("Ġ" in line or "Ð" in line for line in said)
    worst = outliermerge.read_manifest(tmp_path / "out")["transplant"]["tensors"][HEAD]["worst"]
    byte_of = {letter: byte for byte, letter in enumerate(_letters())}
    for entry in worst:
        spelt = bytes(byte_of[letter] for letter in entry["token"])
        assert entry["text"] in (spelt.decode(errors="replace"), "".join(
            f"<0x{byte:02X}>" for byte in spelt
        ))  # fmt: skip


def test_the_means_among_the_approximated_are_counted(models, tmp_path, capsys):
    model, donor = tmp_path / "model", models("byte-level BPE", "other")
    shutil.copytree(models("WordPiece"), model)
    words = ["tokenizer", "transplant", str(model), str(donor), str(tmp_path / "out"), "-q"]
    assert cli([*words, "--method", "subtokens", "--no-load-check"]) == 0
    report = outliermerge.read_manifest(tmp_path / "out")["transplant"]
    number = report["tensors"][EMBEDDINGS]["num_without_basis"]
    assert 0 < number < report["num_approximated"]
    command._print_report(open_console(), report, verbose=False)
    assert f"approximated by subtokens, {number} of them the mean of all rows" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_the_help_of_the_command_lists_what_follows_it(words, code, capsys):
    assert cli(["tokenizer", *words]) == code
    said = capsys.readouterr().out
    assert "transplant  give a model the tokenizer" in said and "--pad-to" not in said
    assert cli(["tokenizer", "transplant", "--help"]) == 0
    assert "--pad-to-multiple-of" in capsys.readouterr().out


def test_the_command_lists_the_methods():
    assert command._METHODS == tuple(APPROXIMATIONS)


def test_a_recipe_of_a_transplant_is_no_spec(models, tmp_path, capsys):
    model, donor = models("BPE"), models("byte-level BPE", "other")
    outliermerge.transplant(model, donor, output=tmp_path / "out", method="zero")
    for file in ("recipe.yaml", "outliermerge.json"):
        assert cli(["run", str(tmp_path / "out" / file), str(tmp_path / "again")]) == 2
        assert "outliermerge tokenizer transplant" in capsys.readouterr().err
    assert cli(["report", str(tmp_path / "out"), "-o", str(tmp_path / "page.html"), "-q"]) == 0
    assert "merge_method: transplant" in (tmp_path / "page.html").read_text()


def test_texts_end_and_words_are_bad_as_in_both_models(models, tmp_path):
    """The model ends its turns with a token which only the donor's tokenizer has as well."""
    model, donor = (
        save_model(tmp_path / "model", "BPE", added=["<|im_end|>", "<img>"]),
        tmp_path / "d",
    )
    save_model(donor, "byte-level BPE", "other", ["<pad>", "<|im_end|>"])
    ids, there = ({t: i for i, t in read_tokens(f).items()} for f in (model, donor))
    said = {"eos_token_id": [ids["</s>"], ids["<|im_end|>"]],
            "bad_words_ids": [[ids["<|im_end|>"]], [ids["<img>"]]]}  # fmt: skip
    (model / "generation_config.json").write_text(json.dumps(said))
    result = outliermerge.transplant(model, donor, output=tmp_path / "out", method="mean")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [there["<|end|>"], there["<|im_end|>"]]
    assert written["bad_words_ids"] == [[there["<|im_end|>"]]]
    said = "ends its texts with '<|im_end|>': the output stops there, too"
    assert any(said in note for note in result.notes)


# Mistakes


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _no_common(folder: Path) -> None:
    """Give a model a tokenizer of words that no other has."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    words = {f"xx{number}": number for number in range(5)}
    (folder / "tokenizer.json").write_text(
        Tokenizer(kinds.WordLevel(words, unk_token="xx0")).to_str()
    )
    (folder / "tokenizer_config.json").unlink()


def _image_token(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": 300}))


def _integers(folder: Path) -> None:
    change(folder, embeddings=load_folder(folder)[EMBEDDINGS].to(torch.int8))


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "no output": (["MODEL", "DONOR"], 2, "no output: name the folder"),
    "a method": (["MODEL", "DONOR", "OUT", "--method", "opm"], 2, "--method: no method 'opm'. Did"),
    "k": (["MODEL", "DONOR", "OUT", "--k", "0"], 2, "'0' is not a number of at least 1"),
    "padding": (["MODEL", "DONOR", "OUT", "--pad-to-multiple-of", "x"], 2, "not a number"),
    "an action": (["MODEL", "DONOR"], 2, "transplant"),
    "no model": (["MODEL-x", "DONOR", "OUT"], 1, "Did you mean"),
    "no tokenizer.json": (
        ["NONE", "DONOR", "OUT", "--method", "subtokens"],
        1,
        "which --method subtokens needs. transformers makes the file",
    ),
    "no donor": (["MODEL", "/nowhere/donor", "OUT"], 1, "no such file or folder"),
    "a taken output": (["MODEL", "DONOR", "MODEL"], 1, "MODEL"),
    "a file": (["MODEL/model.safetensors", "DONOR", "OUT"], 1, "expected the folder of a language"),
    "a memory": (["MODEL", "DONOR", "OUT", "--memory", "1KiB"], 2, "--memory"),
}
BROKEN: dict[str, tuple[str, Callable[[Path], None], str, str]] = {
    "model without tokenizer": (
        "model", _without("tokenizer.json"), "omp", "has no tokenizer files that can be read",
    ),
    "donor without tokenizer": (
        "donor", _without("tokenizer.json"), "mean", "has no tokenizer files that can be read",
    ),
    "donor without weights": (
        "donor", _without("model.safetensors"), "interpolate", "'subtokens' needs only its",
    ),
    "nothing in common": (
        "donor", _no_common, "omp", "have no token in common that is not special",
    ),
    "lost image token": ("model", _image_token, "mean", "image_token_id 300"),
    "integers": ("model", _integers, "mean", "it is unclear whether these tensors have a row"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_of_a_command_line(case, models, tmp_path, capsys):
    words, code, said = MISTAKES[case]
    model, donor = str(models("BPE")), str(models("byte-level BPE", "other"))
    names = {"MODEL": model, "DONOR": donor, "OUT": tmp_path / "out", "NONE": tmp_path / "none"}
    if "NONE" in words:
        shutil.copytree(models("BPE"), tmp_path / "none")
        vocabulary = json.loads((tmp_path / "none/tokenizer.json").read_text())["model"]["vocab"]
        (tmp_path / "none/tokenizer.json").unlink()
        (tmp_path / "none/vocab.json").write_text(json.dumps(vocabulary))
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    action = "transplnat" if case == "an action" else "transplant"
    assert cli(["tokenizer", action, *words]) == code
    err = capsys.readouterr().err
    assert said.replace("MODEL", model) in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BROKEN)
def test_models_that_do_not_fit(case, models, tmp_path):
    which, spoil, method, said = BROKEN[case]
    folders = {"model": models("BPE"), "donor": models("byte-level BPE", "other")}
    shutil.copytree(folders[which], tmp_path / which)
    spoil(tmp_path / which)
    folders[which] = tmp_path / which
    with pytest.raises(outliermerge.OutlierMergeError) as error:
        outliermerge.transplant(*folders.values(), output=tmp_path / "out", method=method, k=4)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_of_the_library(models, tmp_path):
    model, donor = models("BPE"), models("byte-level BPE", "other")
    for more in ({"k": 0}, {"k": 2.5}, {"method": "best"}, {"pad_to_multiple_of": -1}):
        with pytest.raises(outliermerge.ArgumentError, match=next(iter(more))):
            outliermerge.transplant(model, donor, output=tmp_path / "out", **more)


def test_torch_is_asked_for_at_once(models, tmp_path, monkeypatch):
    from outliermerge import optional

    monkeypatch.setattr(optional, "is_installed", lambda module: module != "torch")
    model, donor = models("BPE"), models("byte-level BPE", "other")
    with pytest.raises(outliermerge.OutlierMergeError, match="needs torch, which is not installed"):
        outliermerge.transplant(model, donor, output=tmp_path / "out")


def test_no_table_is_printed_where_no_errors_are_known(models, tmp_path, capsys):
    words = [str(models("BPE")), str(models("byte-level BPE", "other")), str(tmp_path / "out")]
    assert cli(["tokenizer", "transplant", *words, "--no-load-check", "--method", "zero"]) == 0
    out = capsys.readouterr().out
    assert "No tokens were held out, so no errors are known." in out
    assert "error in donor" not in out
