"""A forward pass of a dense model of transformers with one layer at a time in memory.

The class, its attention masks and its positions are transformers' own. A layer's weights are read
when it is called, and forgotten afterwards. Sources are read, so that adapters and quantised models
pass as well.

Legend: P texts, T tokens, H hidden size.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from outliermerge.checkpoint.computed import read_rows
from outliermerge.checkpoint.folders.beside import files_in, sidecars_of
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source
from outliermerge.checkpoint.tokens import check_texts
from outliermerge.errors import OutlierMergeError, quoted, shown
from outliermerge.optional import is_installed, require_torch
from outliermerge.planning.plan import Input
from outliermerge.storage.files import small_bytes

if TYPE_CHECKING:
    from torch import Tensor

    OnLayer: TypeAlias = Callable[[int, Tensor], None]

_EMBEDDINGS = "embed_tokens.weight"
# Of one prompt, and of all when they are filled up to the longest, as a batch takes memory.
_MAX_TOKENS, _MAX_BATCH = 8192, 1 << 18


def require_transformers(what: str) -> None:
    """Refuse what needs torch and transformers where they are not installed.

    Raises:
        OutlierMergeError: one of them is not.
    """
    require_torch(what)
    if not is_installed("transformers"):
        raise OutlierMergeError(
            f"{what} needs transformers, which is not installed: pip install transformers"
        )


def tokens_of(entry: Input, texts: Sequence[str]) -> tuple[list[list[int]], int | None]:
    """Return the tokens of texts, each after the token that begins a text, and that token.

    Raises:
        OutlierMergeError: the model has no tokenizer that can be used, or a text has no tokens, or
            texts have too many.
    """
    from transformers import AutoTokenizer

    home = entry.tokenizer_home
    copy = str(home)
    check_texts(home, sum(map(len, texts)))
    try:
        with _silenced(), _copied(home) as copy:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                copy, local_files_only=True, trust_remote_code=False
            )
            begin = tokenizer.bos_token or ""
            whole = [begin + text for text in texts]
            tokens = tokenizer(whole, add_special_tokens=False)["input_ids"] if whole else []
    except (KeyboardInterrupt, SystemExit, OutlierMergeError):
        raise
    except BaseException as error:  # anything for files that are broken or absent, panics, too
        said = str(error).partition("\n")[0].replace(copy, str(home))
        raise OutlierMergeError(
            f"{shown(entry.reference)}: transformers finds no tokenizer in {shown(str(home))} that "
            f"can cut the prompts ({shown(said)})"
        ) from error
    for text, own in zip(texts, tokens, strict=True):
        if not own:
            raise OutlierMergeError(f"the prompt {quoted(text)} has no tokens")
        if len(own) > _MAX_TOKENS:
            raise OutlierMergeError(
                f"the prompt {quoted(text)} has {len(own):,} tokens, expected at most "
                f"{_MAX_TOKENS:,}: shorten it"
            )
    if (num_tokens := len(tokens) * max(map(len, tokens), default=0)) > _MAX_BATCH:
        raise OutlierMergeError(
            f"the {len(texts):,} prompts have {num_tokens:,} tokens when they are filled up to the "
            f"longest, expected at most {_MAX_BATCH:,}: give fewer or shorter ones"
        )
    return tokens, tokenizer.bos_token_id if begin else None


def embeddings_of(entry: Input, reader: Reader, tokens: Sequence[int]) -> Tensor:
    """Return the rows of some tokens, in float32; only these rows are read.

    Raises:
        OutlierMergeError: the embeddings have no such row.
    """
    import torch

    (source,) = (s for n, s in entry.checkpoint.tensors.items() if n.endswith(_EMBEDDINGS))
    if max(tokens) >= source.shape[0]:
        raise OutlierMergeError(
            f"{shown(entry.reference)}: its tokenizer gives token {max(tokens)}, its embeddings "
            f"have {source.shape[0]} rows"
        )
    return torch.cat([read_rows(reader, source, token, token + 1).float() for token in tokens])


def forward(
    entry: Input,
    layers: Sequence[str],
    tokens: Sequence[Sequence[int]],
    reader: Reader,
    *,
    device: str,
    on_layer: OnLayer,
    on_mlp: OnLayer,
) -> None:
    """Compute the hidden states of texts, in one batch in float32.

    Args:
        layers: how the names of each layer's tensors begin.
        tokens: of each text; shorter ones are filled up at their ends, which no earlier token sees.
        on_layer: called with each layer's number and input (P, T, H).
        on_mlp: called with each layer's number and the input of its MLP (P, T, H).
    """
    import torch

    with _told_of(entry):
        model = _built(entry, device)
        for layer, start in zip(model.layers, layers, strict=True):
            for name, parameter in layer.named_parameters():
                if (shape := entry.checkpoint.tensors[start + name].shape) != parameter.shape:
                    said = f"{start + name} has shape {[*shape]}, by it {[*parameter.shape]}"
                    raise ValueError(said)
    held = {n: torch.empty_like(p, device=device) for n, p in model.layers[0].named_parameters()}
    for number, (layer, start) in enumerate(zip(model.layers, layers, strict=True)):
        _read_when_called(layer, entry.checkpoint.tensors, start, reader, held)
        layer.register_forward_pre_hook(_calling(on_layer, number), with_kwargs=True)
        layer.mlp.register_forward_pre_hook(_calling(on_mlp, number), with_kwargs=True)
    known = sorted({token for own in tokens for token in own})
    rows = embeddings_of(entry, reader, known)
    place = {token: at for at, token in enumerate(known)}
    longest = max(map(len, tokens))
    at = torch.tensor([[place[t] for t in own] + [0] * (longest - len(own)) for own in tokens])
    with torch.no_grad(), _told_of(entry):
        model(inputs_embeds=rows[at].to(device), use_cache=False)


def _built(entry: Input, device: str) -> Any:
    """Return the model of a config, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModel

    build: Any = AutoModel.from_config
    with _copied(entry.home) as copy:
        config = AutoConfig.from_pretrained(copy, local_files_only=True, trust_remote_code=False)
    for key in ("quantization_config", "compression_config"):
        if hasattr(config, key):  # the weights are read as plain numbers
            delattr(config, key)
    with torch.device("meta"):
        model: Any = build(config, dtype=torch.float32).eval()
    model.rotary_emb = type(model.rotary_emb)(config=config).to(device)
    model.norm = torch.nn.Identity()
    return model


@contextmanager
def _copied(home: Path) -> Iterator[str]:
    """Yield a folder with the small files of a model, for transformers to read.

    transformers takes a file that cannot be read for one that is not there, and goes on without it.

    Raises:
        OutlierMergeError: one cannot be read.
    """
    with tempfile.TemporaryDirectory() as copy:
        for name in sidecars_of(files_in(home), ()):
            if "/" not in name and not name.endswith(".py"):
                (Path(copy) / name).write_bytes(small_bytes(home / name))
        yield copy


@contextmanager
def _silenced() -> Iterator[None]:
    """Let transformers not warn: it prints what configs say, with their control characters."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _told_of(entry: Input) -> Iterator[None]:
    """Turn what transformers raises for a config that is not as its class needs it into an error.

    Raises:
        OutlierMergeError: it names the model.
    """
    try:
        with _silenced():
            yield
    except (OutlierMergeError, OSError, MemoryError):
        raise
    except Exception as error:  # of any kind
        said = str(error).partition("\n")[0] or type(error).__name__
        raise OutlierMergeError(
            f"{shown(entry.reference)}: transformers cannot compute it by its config.json in "
            f"{shown(str(entry.home))} ({shown(said)}), which gate_mode hidden and the routing need"
        ) from error


def _calling(call: OnLayer, number: int) -> Any:
    def hook(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        call(number, given[0] if given else named["hidden_states"])

    return hook


def _read_when_called(
    layer: Any, tensors: Mapping[str, Source], start: str, reader: Reader, held: dict[str, Any]
) -> None:
    """Let a layer read its weights before it is called, and forget them afterwards.

    Args:
        held: the memory for them by name, which all layers share; freed and taken again for each
            layer, it would grow.
    """

    def load(module: Any, given: Any) -> None:
        for name, _ in module.named_parameters():
            source = tensors[start + name]
            values = reader.values(source, 0, source.num_elements).view(source.shape)
            held[name].copy_(values)
        module.load_state_dict(held, assign=True)

    def forget(module: Any, given: Any, result: Any) -> None:
        module.to("meta")

    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(forget)
