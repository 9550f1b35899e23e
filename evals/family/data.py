"""The two tasks of the tiny family: attributes of easy-VQA's images, and counting in drawn scenes.

A, attributes: the images and questions of the package easy-vqa 1.0 (MIT, Victor Zhou,
github.com/vzhou842/easy-VQA): shape, colour, and yes-no. Its yes-no questions can be answered from
their text in 84% of the cases ("is there not a …": yes), so those with a negation are left out, and
of the rest as many with the answer no are kept as with yes: in training per split, in the sets for
scores exactly, each question with the answer yes on one image and no on another.
B, mathematics: scenes of 4 × 4 cells with coloured shapes, 0 to 4 of each colour: count, compare,
add. Compare is paired like yes-no, and never asked of equal numbers.

    python evals/family/data.py OUT --seed 7      # test sets as parquet files in OUT/tiny
"""

from __future__ import annotations

import argparse
import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
CELL = 16  # of a drawn scene's 4 × 4 grid; also the model's patch
MOST_OF_A_COLOUR = 4  # four colours fill the 16 cells at most
FEWEST_SHAPES = 5  # nearly empty scenes would be the same in two splits

# easy-VQA's own colours, so that both tasks name the same things.
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
SCENE_COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

TASKS = ("attributes", "mathematics")
KINDS = {
    "attributes": ("shape", "colour", "yes_no"),
    "mathematics": ("count", "compare", "add"),
}
SPLITS = ("training", "validation", "test")
VALIDATION_EVERY = 10  # each tenth of easy-VQA's training images is for validation
TRAINING_SCENES = 12_000
HELD_OUT_SCENES = 2_000
ROWS = 600  # of a validation or test set: 200 of each kind


@dataclass(frozen=True)
class Scene:
    """An image, with the questions (text, answer) of each kind that may be asked about it."""

    name: str
    png: bytes
    questions: dict[str, list[tuple[str, str]]]


def stream(seed: int, purpose: str, split: str) -> np.random.Generator:
    """Return the random numbers of one purpose and split, apart from all others of the seed."""
    return np.random.default_rng([seed, SPLITS.index(split), *purpose.encode()])


def scenes(task: str, split: str, seed: int, most: int | None = None) -> list[Scene]:
    """Return the scenes of a split, or the first of them; no image is in two splits of one seed."""
    return _easy_vqa(split)[:most] if task == "attributes" else _drawn(split, seed, most)


def rows(task: str, split: str, seed: int, count: int = ROWS) -> list[dict[str, Any]]:
    """Draw `count` questions: equally many of each kind, each yes paired with a no to its text.

    Images are asked again only when all have been asked.
    """
    generator = stream(seed, f"{task} rows", split)
    drawn = scenes(task, split, seed)
    times_asked: dict[str, int] = defaultdict(int)
    picked: list[dict[str, Any]] = []
    for kind in KINDS[task]:
        pairs = kind in ("yes_no", "compare")
        picked += _pick(drawn, kind, count // len(KINDS[task]), pairs, times_asked, generator)
    order = generator.permutation(len(picked))
    return [{"id": f"{task}-{split}-{n:04d}", **picked[i]} for n, i in enumerate(order)]


def _pick(
    drawn: list[Scene],
    kind: str,
    count: int,
    pairs: bool,
    times_asked: dict[str, int],
    generator: np.random.Generator,
) -> list[dict[str, Any]]:
    askable = [
        (scene, text, answer) for scene in drawn for text, answer in scene.questions.get(kind, [])
    ]
    by_want: dict[Any, list[tuple[Scene, str, str]]] = defaultdict(list)
    for i in generator.permutation(len(askable)):
        scene, text, answer = askable[i]
        by_want[(text, answer) if pairs else None].append((scene, text, answer))
    result, taken = [], set()
    for want in _yes_no_pairs(by_want, count, generator) if pairs else [None] * count:
        choices = (c for c in by_want[want] if (c[0].name, c[1]) not in taken)
        scene, text, answer = _least_asked(choices, times_asked)
        taken.add((scene.name, text))
        times_asked[scene.name] += 1
        result.append({"image": scene.png, "question": text, "answer": answer, "kind": kind})
    return result


def _least_asked(
    choices: Iterable[tuple[Scene, str, str]], times_asked: dict[str, int]
) -> tuple[Scene, str, str]:
    best = None
    for choice in choices:
        if not times_asked[choice[0].name]:
            return choice
        if best is None or times_asked[choice[0].name] < times_asked[best[0].name]:
            best = choice
    assert best is not None, "more questions are wanted than the split has"
    return best


def _yes_no_pairs(
    by_want: dict[Any, list[Any]], count: int, generator: np.random.Generator
) -> list[tuple[str, str]]:
    texts = sorted({text for text, _ in by_want})
    generator.shuffle(texts)
    left = {text: min(len(by_want[text, a]) for a in ("yes", "no")) for text in texts}
    rounds = [text for n in range(max(left.values())) for text in texts if n < left[text]]
    return [(text, answer) for text in rounds[: count // 2] for answer in ("yes", "no")]


def _easy_vqa(split: str) -> list[Scene]:
    import easy_vqa

    test = split == "test"
    texts, answers, numbers = (
        easy_vqa.get_test_questions() if test else easy_vqa.get_train_questions()
    )
    paths = easy_vqa.get_test_image_paths() if test else easy_vqa.get_train_image_paths()
    mine = {
        number
        for number in paths
        if test or (number % VALIDATION_EVERY == 0) == (split == "validation")
    }
    asked = [q for q in zip(texts, answers, numbers, strict=True) if q[2] in mine]
    # Yes is the rarer answer to each of the questions that stay.
    noes_left = Counter(text for text, answer, _ in asked if answer == "yes")
    questions: dict[int, dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for text, answer, number in asked:
        if answer in ("yes", "no"):
            kind = "yes_no"
            if {"no", "not"} & set(text.split()):
                continue
            if answer == "no":
                noes_left[text] -= 1
                if noes_left[text] < 0:
                    continue
        else:
            kind = "colour" if answer in COLOURS else "shape"
        questions[number][kind].append((text, answer))
    return [
        Scene(f"{number}", Path(paths[number]).read_bytes(), dict(questions[number]))
        for number in sorted(questions)
    ]


def _drawn(split: str, seed: int, most: int | None) -> list[Scene]:
    generator = stream(seed, "scenes", split)
    count = most or (TRAINING_SCENES if split == "training" else HELD_OUT_SCENES)
    result = []
    while len(result) < count:
        numbers = dict(
            zip(SCENE_COLOURS, generator.integers(0, MOST_OF_A_COLOUR + 1, 4).tolist(), strict=True)
        )
        if sum(numbers.values()) < FEWEST_SHAPES:
            continue
        image, _ = draw_grid([c for c, n in numbers.items() for _ in range(n)], generator)
        result.append(Scene(f"{len(result)}", to_png(image), scene_questions(numbers)))
    return result


def scene_questions(numbers: dict[str, int]) -> dict[str, list[tuple[str, str]]]:
    """Return what can be asked of a scene with these numbers of shapes of each colour."""
    pairs = [(a, b) for a in numbers for b in numbers if a != b]
    return {
        "count": [(f"how many {a} shapes are there?", str(n)) for a, n in numbers.items()],
        "compare": [
            (f"are there more {a} than {b} shapes?", "yes" if numbers[a] > numbers[b] else "no")
            for a, b in pairs
            if numbers[a] != numbers[b]
        ],
        "add": [
            (f"how many {a} and {b} shapes are there together?", str(numbers[a] + numbers[b]))
            for a, b in pairs
        ],
    }


def draw_grid(
    colours: Iterable[str], generator: np.random.Generator
) -> tuple[Image.Image, list[tuple[str, str, tuple[float, float, float, float]]]]:
    """Draw one shape of each colour given, in cells of the grid; return also what is where."""
    image = _background(generator)
    colours = list(colours)
    placed = []
    for cell, colour in zip(generator.permutation(16)[: len(colours)], colours, strict=True):
        row, column = divmod(int(cell), 4)
        half = int(generator.integers(4, 7))
        slack = CELL // 2 - half - 1
        x, y = generator.integers(-slack, slack + 1, 2) + CELL // 2
        x, y = column * CELL + int(x), row * CELL + int(y)
        box = (x - half, y - half, x + half, y + half)
        shape = SHAPES[generator.integers(3)]
        draw_shape(image, shape, COLOURS[colour], box)
        placed.append((colour, shape, box))
    return image, placed


def draw_single(
    generator: np.random.Generator,
) -> tuple[Image.Image, list[tuple[str, str, tuple[float, float, float, float]]]]:
    """Draw one shape anywhere, the kind of image that easy-VQA has; return also what is where."""
    image = _background(generator)
    colour = list(COLOURS)[generator.integers(len(COLOURS))]
    shape = SHAPES[generator.integers(3)]
    width, height = generator.integers(8, 33, 2).tolist()
    if shape != "rectangle":
        height = width
    x, y = (int(generator.integers(0, IMAGE_SIZE - n + 1)) for n in (width, height))
    box = (x, y, x + width - 1, y + height - 1)
    draw_shape(image, shape, COLOURS[colour], box)
    return image, [(colour, shape, box)]


def _background(generator: np.random.Generator) -> Image.Image:
    light = tuple(generator.integers(230, 256, 3).tolist())
    return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), light)


def draw_shape(image: Image.Image, shape: str, fill: Any, box: tuple[float, ...]) -> None:
    """Draw a shape that fills the box (left, top, right, bottom; inclusive)."""
    left, top, right, bottom = box
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "rectangle":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=fill)


def to_png(image: Image.Image) -> bytes:
    """Return the image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def to_pixels(png: bytes) -> np.ndarray[Any, Any]:
    """Return a PNG's uint8 pixels, [3, height, width]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).transpose(2, 0, 1)


def write_test_sets(folder: str | Path, seed: int, count: int = ROWS) -> list[Path]:
    """Write `tiny/attributes.parquet` and `tiny/mathematics.parquet` of the test split."""
    return _write(folder, "test", seed, count)


def write_validation_sets(folder: str | Path, seed: int, count: int = ROWS) -> list[Path]:
    """Write the files of `write_test_sets` from the validation split, for every choice."""
    return _write(folder, "validation", seed, count)


def _write(folder: str | Path, split: str, seed: int, count: int) -> list[Path]:
    import datasets

    features = datasets.Features(
        {name: datasets.Value("string") for name in ("id", "question", "answer", "kind")}
        | {"image": datasets.Image()}
    )
    target = Path(folder) / "tiny"
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for task in TASKS:
        table = [
            {**row, "image": {"bytes": row["image"], "path": None}}
            for row in rows(task, split, seed, count)
        ]
        path = target / f"{task}.parquet"
        partial = path.with_suffix(".partial")
        datasets.Dataset.from_list(table, features=features).to_parquet(partial)
        partial.replace(path)
        paths.append(path)
    return paths


def main() -> None:
    """Write test sets (or validation sets) from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=ROWS, help="of each task")
    parser.add_argument("--validation", action="store_true", help="not the test sets")
    options = parser.parse_args()
    write = write_validation_sets if options.validation else write_test_sets
    for path in write(options.folder, options.seed, options.rows):
        print(path)


if __name__ == "__main__":
    main()
