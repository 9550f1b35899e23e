"""The tiny family: its data, its models as committed, and its training from end to end."""

import io
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from evals.family import data

FAMILY = Path(data.__file__).with_name("models")
NAMES = ("base", "instruct", "maths")


def pixels_of(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def is_colour(pixels, colour):
    return (np.abs(pixels - np.array(data.COLOURS[colour])) < 30).all(-1)


def recount(png):
    """The number of the 4 × 4 cells that hold each colour."""
    pixels = pixels_of(png)
    return {
        colour: sum(
            bool(is_colour(pixels[y : y + 16, x : x + 16], colour).sum() > 10)
            for y in range(0, 64, 16)
            for x in range(0, 64, 16)
        )
        for colour in data.SCENE_COLOURS
    }


@pytest.fixture(scope="module")
def rows():
    """Two splits of each task; the test split with a seed that no study uses."""
    return {
        (task, split): data.rows(task, split, 987, 120)
        for task in data.TASKS
        for split in ("validation", "test")
    }


def test_one_seed_gives_the_same_bytes_and_another_gives_others(tmp_path):
    written = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        paths = data.write_validation_sets(tmp_path / folder, seed, 12)
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    assert written[0][0] != written[2][0] and written[0][1] != written[2][1]


def test_files_decode_to_images_and_columns(tmp_path, monkeypatch, rows):
    import datasets

    data.write_test_sets(tmp_path, 987, 120)
    for task in data.TASKS:
        file = str(tmp_path / "tiny" / f"{task}.parquet")
        table = datasets.load_dataset("parquet", data_files={"test": file}, cache_dir=tmp_path)
        first, expected = table["test"][0], rows[task, "test"][0]
        assert set(first) == {"id", "image", "question", "answer", "kind"}
        assert first["image"].size == (64, 64)
        assert (np.asarray(first["image"].convert("RGB")) == pixels_of(expected["image"])).all()
        assert (first["question"], first["answer"]) == (expected["question"], expected["answer"])


@pytest.fixture(scope="module")
def validation_rows():
    """What the committed models, of seed 0, were scored on."""
    return {task: data.rows(task, "validation", 0) for task in data.TASKS}


@pytest.fixture(scope="module")
def training_scenes():
    """What seed 0 trains on."""
    return {task: data.scenes(task, "training", 0) for task in data.TASKS}


@pytest.mark.parametrize("task", data.TASKS)
def test_no_image_is_in_two_splits(task, training_scenes):
    pngs = {s: {scene.png for scene in data.scenes(task, s, 0)} for s in ("validation", "test")}
    pngs["training"] = {scene.png for scene in training_scenes[task]}
    for a, b in (("training", "validation"), ("training", "test"), ("validation", "test")):
        assert not pngs[a] & pngs[b]


@pytest.mark.parametrize("task", data.TASKS)
def test_kinds_are_balanced_and_yes_comes_as_often_as_no_to_each_text(task, rows):
    drawn = rows[task, "test"]
    assert Counter(row["kind"] for row in drawn) == dict.fromkeys(data.KINDS[task], 40)
    answers = defaultdict(Counter)
    for row in drawn:
        if row["kind"] in ("yes_no", "compare"):
            answers[row["question"]][row["answer"]] += 1
    assert answers
    assert all(found["yes"] == found["no"] for found in answers.values())
    asked = [(row["image"], row["question"]) for row in drawn]
    assert len(asked) == len(set(asked))


def test_answers_about_drawn_scenes_are_right(rows):
    for row in rows["mathematics", "validation"] + rows["mathematics", "test"]:
        numbers, text = recount(row["image"]), row["question"]
        named = [numbers[word] for word in re.findall("|".join(data.SCENE_COLOURS), text)]
        if "more" in text:
            expected = "yes" if named[0] > named[1] else "no"
        else:
            expected = str(sum(named))
        assert (text, row["answer"]) == (text, expected)


def test_answers_about_easy_vqa_images_are_right_in_colour(rows):
    checked = 0
    for row in rows["attributes", "validation"]:
        colours = [row["answer"]] if row["kind"] == "colour" else []
        colours += [word for word in row["question"].rstrip("?").split() if word in data.COLOURS]
        for colour in colours:
            present = is_colour(pixels_of(row["image"]), colour).sum() > 8
            assert present == (row["answer"] != "no"), row["question"]
            checked += 1
    assert checked > 60


@pytest.mark.parametrize("task", data.TASKS)
def test_the_text_alone_answers_little(task, training_scenes, validation_rows):
    answers = defaultdict(Counter)
    for scene in training_scenes[task]:
        for questions in scene.questions.values():
            for text, answer in questions:
                answers[text][answer] += 1
    drawn = validation_rows[task]
    guessed = [answers[r["question"]].most_common(1)[0][0] == r["answer"] for r in drawn]
    assert len(drawn) == 600
    assert sum(guessed) / len(drawn) < 0.36


@pytest.mark.parametrize("name", NAMES)
def test_committed_models_load_whole_and_answer_as_recorded(name, validation_rows):
    from evals.family.model import build_tokenizer, load
    from evals.family.score import score

    model = load(FAMILY / name)
    assert sum(parameter.numel() for parameter in model.parameters()) == 881_600
    record = json.loads((FAMILY / "training.json").read_text())
    assert record["seed"] == 0
    for task, drawn in validation_rows.items():
        # Other versions of torch may turn a close answer or two.
        assert score(model, build_tokenizer(), drawn) == pytest.approx(
            record["validation"][name][task], abs=0.011
        )


def test_the_batched_scorer_answers_as_generate_does(rows):
    import torch
    from transformers import AutoProcessor

    from evals.family.model import load, prompt
    from evals.family.score import answers

    model = load(FAMILY / "base")
    processor = AutoProcessor.from_pretrained(FAMILY / "base")
    drawn = rows["attributes", "validation"][:25] + rows["mathematics", "validation"][:25]
    generated = []
    for row in drawn:
        image = Image.open(io.BytesIO(row["image"])).convert("RGB")
        text = prompt(processor.tokenizer, row["question"])
        inputs = processor(images=[image], text=text, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        new = ids[:, inputs["input_ids"].shape[1] :]
        generated += processor.batch_decode(new, skip_special_tokens=True)
    assert [g.strip().lower() for g in generated] == answers(model, processor.tokenizer, drawn)


def test_training_runs_from_end_to_end_and_one_base_serves_both_regimes(tmp_path):
    from evals.family import train

    # Two processes that import transformers would take most of this file's time.
    few = {"scale": 0.004, "in_parallel": False}
    first = train.train_family(tmp_path / "strong", 5, "strong", **few)
    assert set(first["validation"]) == set(NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["strong"]
    second = train.train_family(tmp_path / "mild", 5, "mild", base=tmp_path / "strong", **few)
    weights = [tmp_path / run / "base" / "model.safetensors" for run in ("strong", "mild")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert second["base"] == first["base"]
    assert 0 < second["instruct"]["relative_change"]
    with pytest.raises(ValueError, match="exists"):
        train.train_family(tmp_path / "mild", 5, "mild")
