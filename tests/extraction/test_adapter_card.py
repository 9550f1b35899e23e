"""The model card beside an adapter: the hub and peft read its front matter, people the rest."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from adapted import llama
from checkpoints import load_folder, save_tensors

import outliermerge

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def in_cache(folder: Path, name: str) -> Path:
    """Return where the hub's cache has a model."""
    return folder / f"models--org--{name}/snapshots/{'0' * 40}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("carded")
    base = llama()
    base.save_pretrained(in_cache(folder, "base"))
    for name in ("one", "two"):
        for parameter in base.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        base.save_pretrained(folder / name)
    for place in (in_cache(folder, "base"), folder / "one"):
        (place / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def card_of(adapter: Path) -> tuple[dict[str, Any], str]:
    card = huggingface_hub.ModelCard.load(adapter / "README.md")
    return card.data.to_dict(), card.text


def test_the_card_says_of_what_the_adapter_is_and_how_it_was_made(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    base = in_cache(models, "base")
    made = outliermerge.extract("one", base=base, output=tmp_path / "a", rank=4, dtype="bfloat16")
    data, text = card_of(tmp_path / "a")
    assert data == {
        "base_model": ["org/base"],
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "tags": ["base_model:adapter:org/base", "lora", "outliermerge"],
    }
    place = base.relative_to(models)
    assert f"What `one` and `{place}` differ by" in text
    assert f"- [`{place}`](https://huggingface.co/org/base) (base), licence `mit`" in text
    assert "- `one`, licence `mit`" in text
    assert '- rank: `4`\n- dtype: `"bfloat16"`\n' in text
    assert re.search(r"- \d+ tensors are factored, at rank 4\n- \d+ tensors are saved whole", text)
    assert f"- of all changes, {made.error:.2g} is lost" in text
    # The code that it shows, run as it is.
    (code,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    found: dict[str, Any] = {}
    with warnings.catch_warnings(action="ignore"):
        exec(code.replace("path/to/this/folder", str(tmp_path / "a")), found)
    assert type(found["model"]).__name__ == "PeftModelForCausalLM"
    assert type(found["base"]).__name__ == "LlamaForCausalLM"


def test_the_card_of_a_merge_has_its_recipe(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    base = str(in_cache(models, "base").relative_to(models))
    spec = {"merge_method": "task_arithmetic", "base_model": base}
    spec |= {"models": [{"model": "one"}, {"model": "two"}]}
    outliermerge.extract(spec, output=tmp_path / "a", rank=4)
    data, text = card_of(tmp_path / "a")
    assert data["tags"] == ["base_model:adapter:org/base", "lora", "merge", "outliermerge"]
    assert "license" not in data and "licence of 1 of the 3 models is not known" in text
    assert "What a merge and" in text
    assert [row for row in text.splitlines() if row.startswith("- `")] == [
        "- `one`, licence `mit`", "- `two`"
    ]  # fmt: skip
    (recipe,) = re.findall("```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "again.yaml").write_text(recipe)
    outliermerge.extract(tmp_path / "again.yaml", output=tmp_path / "b", rank=4)
    again, first = (load_folder(tmp_path / name) for name in ("b", "a"))
    assert again.keys() == first.keys() and all(again[n].equal(first[n]) for n in first)


def test_a_base_without_a_class_gets_a_card_without_code(tmp_path: Path) -> None:
    weights = {"layers.0.q.weight": torch.randn(16, 12), "layers.0.k.weight": torch.randn(16, 12)}
    base = save_tensors(tmp_path / "base", weights)
    tuned = save_tensors(tmp_path / "tuned", {n: t + 0.1 for n, t in weights.items()})
    outliermerge.extract(tuned, base=base, output=tmp_path / "a", rank=2)
    data, text = card_of(tmp_path / "a")
    assert data == {"library_name": "peft", "tags": ["lora", "outliermerge"]}
    assert "```" not in text and "licence of any model is not known" in text
