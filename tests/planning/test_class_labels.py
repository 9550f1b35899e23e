"""Rows of a classification head are merged only with rows of the same class."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import load_folder
from safetensors.torch import save_file

import outliermerge
from outliermerge.errors import OutlierMergeError

CLASSES = ["neg", "neu", "pos"]
HEADS = ["classifier", "score", "classification_head.out_proj", "classifier.1", "head.fc",
         "decode_head.classifier", "linear"]  # fmt: skip


def save(folder: Path, labels: list[str] | None, seed: int, head: str = "classifier", **config):
    made = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    num_labels = len(labels or CLASSES)
    tensors = {
        f"{head}.weight": torch.randn(num_labels, 4, generator=made),
        f"{head}.bias": torch.randn(num_labels, generator=made),
        "model.layers.0.mlp.weight": torch.randn(3, 4, generator=made),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    named = {"id2label": dict(enumerate(labels))} if labels else {}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **named, **config}))
    return tensors


def spec_of(folder: Path, method: str, models: list[str], **keys: Any) -> dict[str, Any]:
    delta = {"base_model": str(folder / "base")} if method != "linear" else {}
    listed = [{"model": str(folder / name)} for name in models]
    return {"merge_method": method, "models": listed, **delta, **keys}


def refused(spec: dict[str, Any]) -> str:
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    return str(caught.value)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "min_sigma"])
def test_rows_of_the_same_labels_in_another_order_are_refused(tmp_path, method, head):
    save(tmp_path / "base", CLASSES, 0, head)
    save(tmp_path / "a", CLASSES, 1, head)
    save(tmp_path / "b", ["pos", "neg", "neu"], 2, head)
    message = refused(spec_of(tmp_path, method, ["a", "b"]))
    assert f"{head}.weight" in message and "mlp" not in message
    assert "row 0: 'neg' in" in message and "'pos' in" in message
    assert "same in another order" in message


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "min_sigma", "ties"])
def test_a_head_of_weight_zero_is_left_out_as_the_message_says(tmp_path, method):
    base = save(tmp_path / "base", CLASSES, 0)
    first = save(tmp_path / "a", CLASSES, 0 if method == "min_sigma" else 1)
    save(tmp_path / "b", ["x", "y", "z"], 2)
    spec = spec_of(tmp_path, method, ["a", "b"])
    message = refused(spec)
    assert "write the same id2label" in message
    assert "`parameters: {weight: [{filter: classifier, value: 0}, {value: 1}]}`" in message
    weight = [{"filter": "classifier", "value": 0}, {"value": 1}]
    spec["models"][1]["parameters"] = {"weight": weight}
    result = outliermerge.run(spec, output=tmp_path / "out")
    kept = base if method == "min_sigma" else first
    for name in ("classifier.weight", "classifier.bias"):
        torch.testing.assert_close(load_folder(result.output)[name], kept[name])
    assert "id2label" in json.loads((tmp_path / "out/config.json").read_text())
    assert any("has other classes (id2label)" in note for note in outliermerge.plan(spec).notes)


@pytest.mark.parametrize("labels", [["NEG", "Neu ", "pos"], CLASSES])
def test_the_same_labels_in_other_letters_merge_without_a_word(tmp_path, labels):
    save(tmp_path / "a", CLASSES, 1)
    save(tmp_path / "b", labels, 2)
    assert not any(
        "class" in n for n in outliermerge.plan(spec_of(tmp_path, "linear", ["a", "b"])).notes
    )


@pytest.mark.parametrize("labels", [None, ["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1", "2"]])
@pytest.mark.parametrize("named_first", [True, False])
def test_classes_without_names_are_noted(tmp_path, labels, named_first):
    save(tmp_path / "a", CLASSES, 1)
    save(tmp_path / "b", labels, 2)
    order = ["a", "b"] if named_first else ["b", "a"]
    plan = outliermerge.plan(spec_of(tmp_path, "linear", order))
    assert any(f"{tmp_path / 'b'} does not name its classes" in note for note in plan.notes)


def test_classes_that_nobody_names_are_no_matter(tmp_path):
    save(tmp_path / "a", None, 1)
    save(tmp_path / "b", ["LABEL_0", "LABEL_1", "LABEL_2"], 2)
    assert not any(
        "class" in n for n in outliermerge.plan(spec_of(tmp_path, "linear", ["a", "b"])).notes
    )


def test_a_head_under_another_models_config_is_refused_and_the_way_out_works(tmp_path):
    save(tmp_path / "base", CLASSES, 0)
    head = save(tmp_path / "a", ["x", "y", "z"], 1)
    spec = spec_of(tmp_path, "task_arithmetic", ["a"])
    message = refused(spec)
    assert f"`config_source: {tmp_path / 'a'}`" in message
    spec["config_source"] = str(tmp_path / "a")
    result = outliermerge.run(spec, output=tmp_path / "out")
    assert torch.equal(load_folder(result.output)["classifier.weight"], head["classifier.weight"])
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert list(written["id2label"].values()) == ["x", "y", "z"]


def test_the_class_names_of_timm_count(tmp_path):
    save(tmp_path / "a", None, 1, "head", label_names=CLASSES)
    save(tmp_path / "b", None, 2, "head", label_names=CLASSES[::-1])
    assert "head.weight" in refused(spec_of(tmp_path, "linear", ["a", "b"]))


def test_a_detectors_row_for_no_object_is_one_more(tmp_path):
    for name, labels in (("a", CLASSES[:2]), ("b", CLASSES[1::-1])):
        save(tmp_path / name, labels, 1, "class_labels_classifier")
    message = refused(spec_of(tmp_path, "linear", ["a", "b"]))
    assert "class_labels_classifier.weight" in message


def test_classes_that_only_label2id_names_count(tmp_path):
    save(tmp_path / "a", CLASSES, 1)
    order = {label: id_ for id_, label in enumerate(CLASSES[::-1])}
    save(tmp_path / "b", None, 2, label2id=order)
    assert "row 0: 'neg' in" in refused(spec_of(tmp_path, "linear", ["a", "b"]))


@pytest.mark.parametrize("order", [CLASSES, CLASSES[::-1]])
@pytest.mark.parametrize("unnamed", [None, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}])
def test_label2id_alone_names_the_classes_too(tmp_path, order, unnamed):
    save(tmp_path / "a", CLASSES, 1)
    ids = {label: id_ for id_, label in enumerate(order)}
    more = {"id2label": unnamed} if unnamed else {}
    save(tmp_path / "b", None, 2, label2id=dict(sorted(ids.items())), **more)
    spec = spec_of(tmp_path, "linear", ["a", "b"])
    if order == CLASSES:
        assert not any("class" in note for note in outliermerge.plan(spec).notes)
    else:
        assert "same in another order" in refused(spec)


@pytest.mark.parametrize("num_labels", [2, 4, 9])
@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_the_way_out_of_heads_with_other_numbers_of_rows_works(tmp_path, head, renamed, num_labels):
    base = save(tmp_path / "base", CLASSES, 0, head)
    model = save(tmp_path / "a", [f"c{n}" for n in range(num_labels)], 1, head)
    own: list[Any] = []
    if renamed:
        own = [{"from": "^wrapped[.]", "to": ""}]
        wrapped = {f"wrapped.{name}": tensor for name, tensor in model.items()}
        save_file(wrapped, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    spec = spec_of(tmp_path, "task_arithmetic", ["a"])
    spec["models"][0] |= {"rename": own} if own else {}
    message = refused(spec)
    if head == "linear":  # no name of a head
        assert "rename: " not in message
        return
    advised = {
        key: yaml.safe_load(value) for key, value in re.findall(r"`(\w+): (\[.*?\])`", message)
    }
    assert advised.keys() == {"rename", "extra", "missing"}
    spec["models"][0] |= advised | {"rename": own + advised["rename"]}
    result = outliermerge.run(spec, output=tmp_path / "out")
    merged = load_folder(result.output)
    assert merged.keys() == base.keys()
    for name in base:
        expected = base[name] if name.startswith(head) else model[name]
        torch.testing.assert_close(merged[name], expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"]["0"] == "neg"
