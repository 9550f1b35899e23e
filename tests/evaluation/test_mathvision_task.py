"""The task `mathvision_direct`: what counts as an answer, and when it is right."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

HOME = Path(__file__).parents[2] / "evals" / "tasks" / "mathvision_direct"


@pytest.fixture(scope="module")
def utils() -> ModuleType:
    spec = spec_from_file_location("mathvision_utils", HOME / "utils.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Questions in the schema of huggingface.co/datasets/MathLLMs/MathVision.
def _choice(answer: str) -> dict[str, Any]:
    return {"question": "How long is it?\n<image1>", "options": ["10", "60", "\\frac{1}{2}", "5"],
            "answer": answer, "decoded_image": Image.new("L", (4, 4))}  # fmt: skip


def _free(answer: str) -> dict[str, Any]:
    return {"question": "How long is it?", "options": [], "answer": answer}


def test_a_question_is_put_with_its_choices(utils):
    text = utils.doc_to_text(_choice("B"), {"default": {}})
    assert text.startswith("How long is it?\n<image1>\nA. 10\nB. 60\n")
    assert text.endswith("\nAnswer with the option's letter from the given choices directly.")
    assert utils.doc_to_text(_free("3")).endswith("\nAnswer the question with a number directly.")
    (picture,) = utils.doc_to_visual(_choice("B"))
    assert picture.mode == "RGB"


@pytest.mark.parametrize(
    "response",
    ["B", "(b).", "B. 60", "B) it is 60", "60", "The answer is B.", "Answer: (B)\nAs is clear",
     "So \\boxed{B}", "\\boxed{A}? No, \\boxed{60}", "**B**"],
)  # fmt: skip
def test_the_right_choice(utils, response):
    assert utils.process_results(_choice("B"), [response]) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    "response", ["", "A", "10", "E", "Be", "The answer is A.", "600", "(C) 60"]
)
def test_not_the_right_choice(utils, response):
    assert utils.process_results(_choice("B"), [response]) == {"accuracy": 0.0}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("12", "12"), ("12.", "12"), ("12.0", "12"), ("The answer is 12 cm.", "12"),
        ("$12$", "12"), ("1,200", "1200"), ("\\boxed{\\frac{1}{2}}", "0.5"), ("45°", "45"),
        ("\\sqrt{2}", "$\\sqrt{2}$"), ("3.142", "3.14"), ("2 \\sqrt{2}", "\\sqrt{8}"),
        ("(3, 5)", "(3,5)"), ("12\\text{ apples}", "12"), ("\\boxed{7} as said", "7"),
    ],
)  # fmt: skip
def test_a_free_answer_that_is_right(utils, response, answer):
    assert utils.process_results(_free(answer), [response]) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("response", "answer"),
    [("", "12"), ("13", "12"), ("-12", "12"), ("12, 13", "12"), ("\\frac{1}{3}", "0.5"),
     ("I do not know", "12"), ("12.02", "12"), ("\\frac{", "12"), ("nan", "12")],
)  # fmt: skip
def test_a_free_answer_that_is_wrong(utils, response, answer):
    assert utils.process_results(_free(answer), [response]) == {"accuracy": 0.0}
