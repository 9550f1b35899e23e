"""Files of tensors beside the weights; they are refused unless the spec leaves them out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.planning.plan import Input
from outliermerge.spec.check import MergeSpec

_KNOWN = (
    (r"^non_lora_(trainables|state_dict)\.bin$",
     "{} holds what was trained beside the LoRA, such as a projector: merge both with the script "
     "of the trainer (LLaVA's is scripts/merge_lora_weights.py), and name the result."),
    (r"^new_embeddings\.",
     "{} holds rows for tokens that the base lacks: add the tokens to the base, "
     "resize_token_embeddings(), and set the rows, then name that as the base."),
    (r"^(value_head|v_head)\.",
     "{} holds a value head, which only reinforcement learning uses."),
    (r"^mm_projector\.",
     "{} holds a projector: name the whole model that has it among its weights."),
    (r"^adapter_model\.",
     "{} is an adapter that is not merged: where it belongs to the model, name both with a plus, "
     "the model's folder + the adapter's folder."),
    (r"^pytorch_(lora|custom_diffusion)_weights\.",
     "{} is an adapter that is not merged into the pipeline: load it there, fuse_lora(), "
     "unload_lora_weights(), save_pretrained()."),
)  # fmt: skip


def check_other_files(spec: MergeSpec, inputs: Sequence[Input]) -> None:
    """Refuse files of tensors that nothing reads, unless `other_files: drop` leaves them out.

    Raises:
        SpecError: a filter matches no such file's name.
        OutlierMergeError: the spec does not mention some files; the message lists all of them.
    """
    found: dict[Path, Input] = {}
    for model in inputs:
        for path in model.checkpoint.other_files:
            found.setdefault(path, model)
    names = {path: _shown(path, model) for path, model in found.items()}
    for entry in spec.other_files.entries:
        if entry.filter is not None and not any(map(entry.matches, names.values())):
            held = f"There are: {', '.join(map(shown, names.values()))}." if names else (
                "There are no such files."
            )  # fmt: skip
            raise spec.source.error(
                entry.filter_path,
                f"the filter {entry.filter!r} is in the name of no file of tensors that would be "
                f"left out. {held}",
            )
    refused = []
    for path, name in names.items():
        setting = spec.other_files.entry_for(name)
        if setting is None or setting.at(0) != "drop":
            refused.append(path)
    if not refused:
        return
    lines = [f"{names[path]}: in {found[path].reference}" for path in refused]
    hints = [
        hint.format(names[path])
        for path in refused
        for pattern, hint in _KNOWN
        if re.match(pattern, path.name)
    ]
    raise OutlierMergeError(
        f"{len(refused)} file(s) of tensors that are not read, beside the weights:\n"
        f"{listing(lines)}\n"
        + "".join(f"{hint}\n" for hint in dict.fromkeys(hints))
        + "They may hold trained weights, which the output would lack. Move away what is not of "
        "the model; `other_files: drop` in the spec leaves all out, a list of filters some."
    )


def _shown(path: Path, entry: Input) -> str:
    for root in (entry.checkpoint.root, entry.home):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return str(path)
