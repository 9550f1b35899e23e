"""MMStar, MMMU and AI2D in small, as they are published: lmms-eval's own tasks run on them.

Columns and file names are those of the dataset cards: Lin-Chen/MMStar (columns by its copy
macabdul9/MMStar), lmms-lab/MMMU and lmms-lab/ai2d, which lmms-eval 0.7.3 loads as
lmms-lab-encoder/MMMU and lmms-lab-encoder/ai2d.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pictures

TEXT = Value("string")
PICTURE_COLUMNS = [f"image_{i}" for i in range(1, 8)]
MMSTAR_FEATURES = Features(
    {
        "index": Value("int64"),
        "question": TEXT,
        "image": Image(),
        "answer": TEXT,
        "category": TEXT,
        "l2_category": TEXT,
        "meta_info": {"source": TEXT, "split": TEXT, "image_path": TEXT},
    }
)
MMMU_FEATURES = Features(
    {
        **dict.fromkeys(("id", "question", "options", "explanation"), TEXT),
        **dict.fromkeys(PICTURE_COLUMNS, Image()),
        **dict.fromkeys(
            ("img_type", "answer", "topic_difficulty", "question_type", "subfield"), TEXT
        ),
    }
)
AI2D_FEATURES = Features(
    {"question": TEXT, "options": Sequence(TEXT), "answer": TEXT, "image": Image()}
)

# Picture, question, answer, category, second category. The first three differ in the picture alone.
COLOUR = "Which color fills it?\nOptions: A: red, B: green, C: blue, D: white"
MMSTAR = [
    ("red", COLOUR, "A", "coarse perception", "image style & quality"),
    ("lime", COLOUR, "B", "coarse perception", "image emotion"),
    ("blue", COLOUR, "C", "fine-grained perception", "recognition"),
    ("red", "Is it 3 + 4?\nOptions: A: 5, B: 6, C: 7, D: 8", "C", "math", "geometry"),
    ("lime", "Which is last?\nOptions: A: x, B: y, C: w, D: z", "D", "math", "geometry"),
]
# Subject, question, options, answer, pictures. Without options the question is open.
MMMU = [
    ("Art", "Who painted <image 1>?", ["Klee", "Miró", "Dalí"], "B", ["red"]),
    ("Art", "Does <image 1> precede <image 2>?", ["Yes", "No"], "A", ["lime", "blue"]),
    ("Math", "What is the slope in <image 1>?", [], "0.75", ["blue"]),
    ("Math", "<image 1> Find x.", ["1", "2", "3", "4"], "D", ["white"]),
    ("Music", "Name the interval in <image 1>.", [], "minor third", ["red"]),
    ("Energy_and_Power", "Which is it?", ["<image 1>", "<image 2>"], "B", ["red", "blue"]),
]
# Question, options, the number of the right one, picture.
AI2D = [
    ("What do frogs eat?", ["grass", "insects", "fish", "soil"], "1", "lime"),
    ("Which letter is the root?", ["A", "B", "C", "D"], "0", "white"),
    ("How many stages are there?", ["2", "3", "4", "5"], "3", "blue"),
    ("What is the top consumer?", ["hawk", "mouse", "snake", "owl"], "0", "red"),
    ("Where does rain go?", ["sky", "sun", "river", "wind"], "2", "blue"),
]


def picture(colour: str) -> Pictures.Image:
    return Pictures.new("RGB", (32, 32), colour)


def save_mmstar(folder: Path) -> None:
    """Lin-Chen/MMStar: one file at the top, which the card says is the split val."""
    rows: list[dict[str, Any]] = [
        {
            "index": i,
            "question": question,
            "image": picture(colour),
            "answer": answer,
            "category": category,
            "l2_category": second,
            "meta_info": {"source": "MMBench", "split": "val", "image_path": f"images/{i}.jpg"},
        }
        for i, (colour, question, answer, category, second) in enumerate(MMSTAR)
    ]
    data = folder / "Lin-Chen" / "MMStar"
    data.mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: val\n  data_files:\n  - split: val\n    path: {}\n---\n"
    (data / "README.md").write_text(card.format("mmstar.parquet"))
    Dataset.from_list(rows, features=MMSTAR_FEATURES).to_parquet(data / "mmstar.parquet")


def save_mmmu(folder: Path) -> None:
    """lmms-lab-encoder/MMMU: the split validation, multiple-choice and open questions."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"validation_{subject}_{i + 1}",
            "question": question,
            "options": repr(options),
            "explanation": "",
            **dict.fromkeys(PICTURE_COLUMNS),
            **dict(zip(PICTURE_COLUMNS, map(picture, colours), strict=False)),
            "img_type": "['Diagrams']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice" if options else "open",
            "subfield": "Theory",
        }
        for i, (subject, question, options, answer, colours) in enumerate(MMMU)
    ]
    data = folder / "lmms-lab-encoder" / "MMMU" / "data"
    data.mkdir(parents=True)
    table = Dataset.from_list(rows, features=MMMU_FEATURES)
    table.to_parquet(data / "validation-00000-of-00001.parquet")


def save_ai2d(folder: Path) -> None:
    """lmms-lab-encoder/ai2d: the split test."""
    rows: list[dict[str, Any]] = [
        {"question": question, "options": options, "answer": answer, "image": picture(colour)}
        for question, options, answer, colour in AI2D
    ]
    data = folder / "lmms-lab-encoder" / "ai2d" / "data"
    data.mkdir(parents=True)
    table = Dataset.from_list(rows, features=AI2D_FEATURES)
    table.to_parquet(data / "test-00000-of-00001.parquet")
