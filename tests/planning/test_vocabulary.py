"""Models with other rows in their embeddings and heads, against rows looked up by token."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import OutlierMergeError
from outliermerge.planning.vocabulary import Alignment, align_vocabulary
from outliermerge.planning.vocabulary_runs import RearrangedRows

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WORDS = [f"word{number}" for number in range(10)]
COLUMNS = 3

Rows = dict[object, torch.Tensor]


def save_vocabulary(
    folder: Path,
    tokens: list[str] | None,
    rows: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] = (EMBEDDINGS, HEAD),
    config: dict | None = None,
    columns: int = COLUMNS,
) -> Path:
    """Save a model with rows for a tokenizer's tokens, in order, and for padding behind them."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {
        name: random(rows) if name.endswith("bias") else random(rows, columns) for name in names
    }
    save_file({**tensors, NORM: random(columns)}, folder / "model.safetensors")
    config = {"vocab_size": rows} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    if tokens is not None:
        save_tokenizer(folder, tokens)
    return folder


def save_tokenizer(folder: Path, tokens: list[str]) -> None:
    words = {token: number for number, token in enumerate(tokens) if not token.startswith("<")}
    tokenizer = Tokenizer(WordLevel(words, unk_token=next(iter(words))))
    tokenizer.add_special_tokens([token for token in tokens if token.startswith("<")])
    assert [tokenizer.id_to_token(number) for number in range(len(tokens))] == tokens
    tokenizer.save(str(folder / "tokenizer.json"))


def align(policy: str, *folders: Path, **sources: int) -> Alignment:
    models = [(folder.name, open_checkpoint(folder)) for folder in folders]
    return align_vocabulary(models, policy, **sources)


def values(alignment: Alignment, number: int, name: str = EMBEDDINGS) -> torch.Tensor:
    source = alignment.checkpoints[number].tensors[name]
    with Reader() as reader:
        return reader.values(source, 0, source.num_elements).view(source.shape)


def rows_of(folder: Path, tokens: list[str] | None, name: str = EMBEDDINGS) -> Rows:
    """Return rows by token; padding by index."""
    with Reader() as reader:
        source = open_checkpoint(folder).tensors[name]
        stored = reader.values(source, 0, source.num_elements).view(source.shape).double()
    return {
        (tokens[row] if tokens and row < len(tokens) else row): stored[row]
        for row in range(len(stored))
    }


def stack(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(rows)


@pytest.fixture
def reference(tmp_path):
    return save_vocabulary(tmp_path / "reference", WORDS, 10)


@pytest.fixture
def with_image(tmp_path):
    return save_vocabulary(tmp_path / "with_image", [*WORDS, "<image>", "<pad>"], 16, seed=1)


# Which models are changed at all


@pytest.mark.parametrize("policy", ["error", "base", "common", "union"])
def test_one_vocabulary_leaves_every_model_as_it_is(tmp_path, reference, policy):
    same = save_vocabulary(tmp_path / "same", WORDS, 10, seed=1)
    alignment = align(policy, reference, same)
    checkpoints = (open_checkpoint(reference), open_checkpoint(same))
    assert alignment == Alignment(checkpoints, None, (), (), stored_rows=10)


def test_one_tokenizer_is_not_even_read(tmp_path, reference):
    same = save_vocabulary(tmp_path / "same", None, 10, seed=1)
    for folder in (reference, same):
        (folder / "tokenizer.json").write_text("{broken")
    assert align("error", reference, same).notes == ()


@pytest.mark.parametrize("policy", ["error", "base", "common", "union"])
def test_tokenizer_files_that_say_the_same_in_other_words_change_nothing(
    tmp_path, reference, policy
):
    same = save_vocabulary(tmp_path / "same", None, 10, seed=1)
    (same / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    alignment = align(policy, reference, same)
    assert alignment.num_rows is None
    assert alignment.notes == ()
    assert alignment.checkpoints[1].tensors == open_checkpoint(same).tensors


def test_a_model_whose_rows_are_the_references_keeps_its_own_sources(
    tmp_path, reference, with_image
):
    same = save_vocabulary(tmp_path / "same", WORDS, 10, seed=2)
    alignment = align("base", reference, with_image, same)
    assert alignment.checkpoints[0] == open_checkpoint(reference)
    assert alignment.checkpoints[2] == open_checkpoint(same)
    moved = alignment.checkpoints[1]
    assert moved.tensors[NORM] == open_checkpoint(with_image).tensors[NORM]
    assert list(moved.tensors) == list(open_checkpoint(with_image).tensors)
    assert isinstance(moved.tensors[EMBEDDINGS], RearrangedRows)


def test_a_pipelines_parts_are_left_to_themselves(tmp_path, reference, with_image):
    models = [
        (folder.name, replace(open_checkpoint(folder), components={"unet": "model"}))
        for folder in (reference, with_image)
    ]
    assert align_vocabulary(models, "error").num_rows is None


def test_a_reference_without_vocabulary_tensors_leaves_models_as_they_are(tmp_path, with_image):
    bare = save_vocabulary(tmp_path / "bare", None, 4, names=("vision.weight",))
    alignment = align("error", bare, with_image)
    assert alignment.num_rows is None


# Policies against rows looked up by token


def vocabularies() -> st.SearchStrategy[tuple[list[str], int]]:
    """Tokens in any order, words first as a tokenizer has them, and padding rows behind.

    There are never as many rows as columns, as the norm would then be unclear.
    """
    words = st.permutations(WORDS[:6]).flatmap(
        lambda words: st.integers(COLUMNS + 1, 6).map(lambda count: list(words[:count]))
    )
    added = st.permutations(["<a>", "<b>", "<c>"]).flatmap(
        lambda tokens: st.integers(0, 3).map(lambda count: list(tokens[:count]))
    )
    return st.tuples(st.builds(lambda a, b: a + b, words, added), st.integers(0, 4))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=st.lists(vocabularies(), min_size=2, max_size=3))
def test_every_policy_gives_each_row_its_token(tmp_path_factory, drawn):
    root = tmp_path_factory.mktemp("drawn")
    folders = [
        save_vocabulary(
            root / f"model{number}", tokens, len(tokens) + padding, seed=number,
            names=(EMBEDDINGS, HEAD, "lm_head.bias"),
        )
        for number, (tokens, padding) in enumerate(drawn)
    ]  # fmt: skip
    for name in (EMBEDDINGS, "lm_head.bias"):
        models = [
            rows_of(folder, tokens, name)
            for folder, (tokens, _) in zip(folders, drawn, strict=True)
        ]
        check_base(align("base", *folders), models, name)
        check_union(folders, [tokens for tokens, _ in drawn], models, name)
        check_common(folders, drawn[0][0], models, name)


def check_base(alignment: Alignment, models: list[Rows], name: str) -> None:
    reference = models[0]
    for number, model in enumerate(models):
        expected = stack([model.get(key, row) for key, row in reference.items()])
        assert torch.equal(values(alignment, number, name).double(), expected)
    assert alignment.num_rows in (None, len(reference))
    assert alignment.added_tokens == ()


def check_union(
    folders: list[Path], tokens: list[list[str]], models: list[Rows], name: str
) -> None:
    """New tokens follow the reference's last, as its loader numbers them: reserved rows first."""
    names = list(tokens[0])
    added = []
    for number, own in enumerate(tokens):
        for token in own:
            if token not in names:
                added.append((len(names), token, number))
                names.append(token)
    if any(token in WORDS for _, token, _ in added):
        with pytest.raises(OutlierMergeError, match="are pieces of the tokenizer's own model"):
            align("union", *folders)
        return
    alignment = align("union", *folders)
    keys = [*names, *range(len(names), len(models[0]))]
    while any(len(keys) in model for model in models[1:]):
        keys.append(len(keys))
    for number, model in enumerate(models):
        expected = []
        for key in keys:
            holders = [other[key] for other in models if key in other]
            if key in model:
                expected.append(model[key])
            elif key in models[0]:
                expected.append(models[0][key])
            else:
                expected.append(sum(holders) / len(holders))
        got = values(alignment, number, name)
        torch.testing.assert_close(got, stack(expected).float(), rtol=0, atol=0)
    assert alignment.num_rows in (None, len(keys))
    assert alignment.added_tokens == tuple(added)


def check_common(folders: list[Path], tokens: list[str], models: list[Rows], name: str) -> None:
    keys = [key for key in models[0] if all(key in model for model in models)]
    kept = list(models[0])[: len(keys)] == keys and set(tokens) <= set(keys)
    if not kept:
        with pytest.raises(OutlierMergeError, match="`vocabulary: common`"):
            align("common", *folders)
        return
    alignment = align("common", *folders)
    for number, model in enumerate(models):
        expected = stack([model[key] for key in keys])
        assert torch.equal(values(alignment, number, name).double(), expected)
    assert alignment.num_rows in (None, len(keys))


def test_a_token_of_one_model_is_its_own_row_in_every_model(tmp_path, reference, with_image):
    alignment = align("union", reference, with_image)
    own = open_checkpoint(with_image)
    assert alignment.num_rows == 16
    assert alignment.added_tokens == ((10, "<image>", 1), (11, "<pad>", 1))
    assert alignment.checkpoints[1] == own
    assert torch.equal(values(alignment, 0)[10:], values(alignment, 1)[10:])
    assert torch.equal(values(alignment, 0)[:10], values(align("base", reference), 0))


def test_a_token_of_two_models_is_their_mean_in_the_reference(tmp_path, reference):
    ours = save_vocabulary(tmp_path / "ours", [*WORDS, "<a>", "<image>"], 12, seed=1)
    theirs = save_vocabulary(tmp_path / "theirs", [*WORDS, "<image>"], 11, seed=2)
    alignment = align("union", reference, ours, theirs)
    image_a = rows_of(ours, [*WORDS, "<a>", "<image>"])["<image>"]
    image_b = rows_of(theirs, [*WORDS, "<image>"])["<image>"]
    assert alignment.added_tokens == ((10, "<a>", 1), (11, "<image>", 1))
    assert torch.equal(values(alignment, 0)[11], ((image_a + image_b) / 2).float())
    assert torch.equal(values(alignment, 2)[11], image_b.float())
    assert torch.equal(values(alignment, 2)[10], values(alignment, 1)[10])


def test_reserved_rows_that_one_model_uses_for_tokens(tmp_path):
    """As Qwen's models have it: more rows than tokens in all of them."""
    base = save_vocabulary(tmp_path / "base", WORDS, 16)
    tuned = save_vocabulary(tmp_path / "tuned", [*WORDS, "<image>"], 16, seed=1)

    by_index = align("error", base, tuned)
    assert by_index.num_rows is None
    assert by_index.notes == (
        "the tokenizer of base does not name 1 token ('<image>' 10) of tuned: "
        "the output's cuts such texts into other tokens. `vocabulary: union` keeps them",
    )
    kept = align("base", base, tuned)
    assert kept.num_rows == 16
    assert torch.equal(values(kept, 1)[10], values(kept, 0)[10])
    assert torch.equal(values(kept, 1)[11:], rows_after(tuned, 11))
    joined = align("union", base, tuned)
    assert joined.added_tokens == ((10, "<image>", 1),)
    assert joined.num_rows == 16
    assert torch.equal(values(joined, 0)[10], rows_after(tuned, 10)[0])
    assert torch.equal(values(joined, 1), rows_after(tuned, 0))
    assert joined.notes == (
        "put into reserved rows of base, from tuned: 1 token ('<image>' 10)",
        "1 token is added to the tokenizer",
    )
    named = align("base", base, tuned, tokenizer=1)
    assert named.added_tokens == ()
    assert torch.equal(values(named, 0)[10], rows_after(tuned, 10)[0])
    assert torch.equal(values(named, 0)[11:], rows_after(base, 11))
    with pytest.raises(OutlierMergeError, match="can only cut rows at the end"):
        align("common", base, tuned)


def rows_after(folder: Path, first: int) -> torch.Tensor:
    return stack(list(rows_of(folder, None).values()))[first:].float()


def test_padding_is_cut_to_what_all_models_share(tmp_path):
    padded = save_vocabulary(tmp_path / "padded", WORDS, 16)
    plain = save_vocabulary(tmp_path / "plain", WORDS, 10, seed=1)
    alignment = align("common", padded, plain)
    assert alignment.num_rows == 10
    assert alignment.notes == (
        "cut, as not all models have them: 6 padding rows (10–15) of padded",
    )
    assert alignment.checkpoints[1] == open_checkpoint(plain)
    assert torch.equal(values(alignment, 0), rows_after(padded, 0)[:10])


@pytest.mark.parametrize("policy", ["base", "common", "union"])
def test_models_without_tokenizers_are_matched_by_index(tmp_path, policy):
    small = save_vocabulary(tmp_path / "small", None, 10)
    large = save_vocabulary(tmp_path / "large", None, 16, seed=1)
    alignment = align(policy, small, large)
    assert alignment.num_rows == (16 if policy == "union" else 10)
    assert alignment.added_tokens == ()
    assert torch.equal(values(alignment, 0)[:10], rows_after(small, 0))
    assert torch.equal(values(alignment, 1), rows_after(large, 0)[: alignment.num_rows])
    assert torch.equal(values(alignment, 0)[10:], values(alignment, 1)[10:])
    assert alignment.notes == (
        "small has no tokenizer files: its rows are matched by index",
        "large has no tokenizer files: its rows are matched by index",
        "added after the rows of small: 6 padding rows (10–15)"
        if policy == "union"
        else "left out of large: 6 rows (10–15)",
    )


def test_the_first_tokenizer_tells_the_tokens_of_a_reference_without_one(tmp_path):
    base = save_vocabulary(tmp_path / "base", None, 10)
    first = save_vocabulary(tmp_path / "first", WORDS, 10, seed=1)
    turned = save_vocabulary(tmp_path / "turned", WORDS[::-1], 10, seed=2)
    with pytest.raises(OutlierMergeError, match="0 is 'word9', in first 'word0'"):
        align("error", base, first, turned)
    alignment = align("base", base, first, turned)
    assert alignment.checkpoints[1] == open_checkpoint(first)
    assert torch.equal(values(alignment, 2), rows_after(turned, 0).flip(0))


def test_tokens_beyond_a_reference_without_a_tokenizer_are_added(tmp_path, with_image):
    base = save_vocabulary(tmp_path / "base", None, 10)
    alignment = align("union", base, with_image, tokenizer=1)
    assert alignment.num_rows == 16
    assert alignment.added_tokens == ()
    assert torch.equal(values(alignment, 0)[10:], rows_after(with_image, 10))
    with pytest.raises(OutlierMergeError, match=r"base, which has no tokenizer files.*_source`"):
        align("union", base, with_image)


def test_a_reference_without_a_tokenizer_is_not_said_to_name_too_little(tmp_path, reference):
    base = save_vocabulary(tmp_path / "base", None, 10)
    same = save_vocabulary(tmp_path / "same", None, 10, seed=1)
    (same / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    assert align("error", base, reference, same).notes == ()


def test_padding_between_tokens_is_added_as_far_as_it_goes_on(tmp_path, reference):
    holes = save_vocabulary(tmp_path / "holes", None, 13, seed=1)
    words = {**{word: number for number, word in enumerate(WORDS[:9])}, WORDS[9]: 11}
    (holes / "vocab.json").write_text(json.dumps(words))
    alignment = align("union", reference, holes)
    rows = rows_after(holes, 0)
    assert torch.equal(values(alignment, 1), rows[[*range(9), 11, 10]])
    assert alignment.notes == (
        "left out of holes: 2 padding rows (9, 12)",
        "holes has other ids than reference for 1 token: matched by token",
        "added after the rows of reference: 1 padding row (10)",
    )


# Which tensors are the vocabulary's


@pytest.mark.parametrize(
    "config",
    [
        lambda size: {"vocab_size": size},
        lambda size: {"text_config": {"vocab_size": size}, "q_former": {"vocab_size": 7}},
        lambda size: {"text_config": {"vocab_size": size}, "vocab_size": 7},
        lambda size: {"thinker": {"decoder": {"vocab_size": size}}},
    ],
)
def test_the_vocab_size_of_a_config_finds_tensors_of_any_name(tmp_path, config):
    names = ("language.table", "language.heads.0.projection")
    ours = save_vocabulary(tmp_path / "ours", WORDS, 10, names=names, config=config(10))
    theirs = save_vocabulary(tmp_path / "theirs", WORDS, 12, names=names, config=config(12))
    alignment = align("base", ours, theirs)
    shapes = {name: source.shape[0] for name, source in alignment.checkpoints[1].tensors.items()}
    assert shapes == {"language.table": 10, "language.heads.0.projection": 10, NORM: COLUMNS}


def test_another_parts_vocabulary_is_not_the_tokenizers(tmp_path):
    names = (EMBEDDINGS, "q_former.word_embeddings.weight")
    config = {"text_config": {"vocab_size": 10}, "q_former": {"vocab_size": 8}}
    folders = []
    for number, words in enumerate((WORDS, WORDS[::-1])):
        folder = save_vocabulary(
            tmp_path / f"model{number}", words, 10, names=names, config=config, seed=number
        )
        path = folder / "model.safetensors"
        tensors = {
            name: tensor[:8] if name == names[1] else tensor for name, tensor in load(path).items()
        }
        save_file(tensors, path)
        folders.append(folder)
    alignment = align("base", *folders)
    changed = alignment.checkpoints[1].tensors
    assert isinstance(changed[EMBEDDINGS], RearrangedRows)
    assert changed[names[1]] == open_checkpoint(folders[1]).tensors[names[1]]


def test_a_stale_vocab_size_beside_the_language_models_hides_nothing(tmp_path):
    config = {"text_config": {"vocab_size": 12}, "vocab_size": 10}
    ours = save_vocabulary(tmp_path / "ours", WORDS, 10, config=config)
    theirs = save_vocabulary(tmp_path / "theirs", WORDS, 12, config=config)
    assert align("base", ours, theirs).num_rows == 10


def test_integers_are_not_touched(tmp_path):
    ours = save_vocabulary(tmp_path / "ours", WORDS, 10)
    theirs = save_vocabulary(tmp_path / "theirs", WORDS, 12)
    for folder, rows in ((ours, 10), (theirs, 12)):
        path = folder / "model.safetensors"
        save_file({**load(path), HEAD: torch.ones(rows, COLUMNS, dtype=torch.int8)}, path)
    changed = align("base", ours, theirs).checkpoints[1].tensors
    assert changed[EMBEDDINGS].shape == (10, COLUMNS)
    assert changed[HEAD] == open_checkpoint(theirs).tensors[HEAD]


def load(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("config", [{}, {"vocab_size": 9}, {"vocab_size": "many"}])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "transformer.word_embeddings.weight",
        "shared.weight",
        "lm_head.bias",
        "embed_out.weight",
        "output.weight",
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
    ],
)
def test_known_names_are_the_vocabularys_where_the_config_does_not_say(tmp_path, name, config):
    ours = save_vocabulary(tmp_path / "ours", WORDS, 10, names=(name,), config=config)
    theirs = save_vocabulary(tmp_path / "theirs", WORDS, 12, names=(name,), config=config)
    assert align("base", ours, theirs).checkpoints[1].tensors[name].shape[0] == 10


@pytest.mark.parametrize(
    "name", ["model.layers.0.output.weight", "model.classifier.weight", "my_shared.weight"]
)
def test_other_tensors_of_another_shape_are_not_touched(tmp_path, name):
    ours = save_vocabulary(tmp_path / "ours", WORDS, 10, names=(name,), config={})
    theirs = save_vocabulary(tmp_path / "theirs", WORDS, 12, names=(name,), config={})
    assert align("base", ours, theirs).num_rows is None


def test_tensors_that_may_have_a_row_for_every_token_by_chance_are_refused(tmp_path):
    names = (EMBEDDINGS, "model.layers.0.mlp.weight")
    ours = save_vocabulary(tmp_path / "ours", WORDS, 10, names=names)
    theirs = save_vocabulary(tmp_path / "theirs", WORDS[::-1], 10, names=names)
    with pytest.raises(OutlierMergeError) as caught:
        align("base", ours, theirs)
    assert str(caught.value) == (
        "the models' vocabularies differ, and it is unclear whether these tensors have a row for "
        "every token:\n  model.layers.0.mlp.weight\nSuch models cannot be merged as they are."
    )
    same = save_vocabulary(tmp_path / "same", [*WORDS[:9], "word9"], 10, names=names)
    assert align("base", ours, same).num_rows is None


def test_embeddings_and_head_with_other_numbers_of_rows_are_refused(tmp_path, reference):
    uneven = save_vocabulary(tmp_path / "uneven", [*WORDS, "<image>"], 12)
    path = uneven / "model.safetensors"
    save_file({**load(path), HEAD: torch.zeros(10, COLUMNS)}, path)
    with pytest.raises(OutlierMergeError, match="unclear") as caught:
        align("base", reference, uneven)
    assert HEAD in str(caught.value)
    assert EMBEDDINGS not in str(caught.value)


def test_a_head_that_the_reference_lacks_has_rows_of_the_models_that_have_it(tmp_path):
    base = save_vocabulary(tmp_path / "base", WORDS, 10, names=(EMBEDDINGS,))
    ours = save_vocabulary(tmp_path / "ours", [*WORDS, "<a>"], 11, seed=1)
    theirs = save_vocabulary(tmp_path / "theirs", [*WORDS[:9], "<a>"], 10, seed=2)
    alignment = align("base", base, ours, theirs)
    assert torch.equal(values(alignment, 2, HEAD)[9], values(alignment, 1, HEAD)[9])
    assert HEAD not in alignment.checkpoints[0].tensors
    with pytest.raises(OutlierMergeError) as caught:
        align("base", base, theirs)
    assert str(caught.value) == (
        f"tensor {HEAD!r}: the first model lacks it, and no model that has it has row 9 of the "
        "output's vocabulary: it cannot be given the output's rows"
    )


# What is refused


def test_rows_that_differ_are_refused_with_what_each_policy_would_do(
    tmp_path, reference, with_image
):
    turned = save_vocabulary(tmp_path / "turned", [*WORDS[:8], "word9", "word8"], 10)
    with pytest.raises(OutlierMergeError) as caught:
        align("error", reference, with_image, turned)
    assert str(caught.value) == (
        "the models' vocabularies differ\n"
        "  reference: 10 rows\n"
        "  with_image: 16 rows\n"
        "    only it has 2 tokens ('<image>' 10, '<pad>' 11) and 4 padding rows (12–15)\n"
        "  turned: 10 rows\n"
        "    the same id means other tokens: 8 is 'word9', in reference 'word8'; "
        "9 is 'word8', in reference 'word9'\n"
        "`vocabulary` in the spec sets what becomes of it:\n"
        "  base: the rows of reference; tokens that only others have are left out (10 rows)\n"
        "  common: only the rows that all models have (10 rows)\n"
        "  union: the rows of reference, then those that only others have (16 rows)\n"
        "Or `tokenizer: {source: union}` pairs rows by their tokens, as mergekit does."
    )


def test_a_refusal_names_ten_tokens_and_counts_the_rest(tmp_path):
    ours = save_vocabulary(tmp_path / "ours", WORDS, 10)
    many = save_vocabulary(tmp_path / "many", [*WORDS, *(f"<{n}>" for n in range(13))], 24)
    with pytest.raises(OutlierMergeError) as caught:
        align("error", ours, many)
    assert "13 tokens ('<0>' 10, " in str(caught.value)
    assert ", '<9>' 19 and 3 more) and 1 padding row (23)\n" in str(caught.value)
    with pytest.raises(OutlierMergeError) as caught:
        align("error", many, ours)
    assert "    it lacks 13 tokens" in str(caught.value)
    assert "common: only the rows that all models have (not possible here)" in str(caught.value)


def test_other_tokens_at_the_same_ids_are_refused_though_the_rows_are_as_many(tmp_path):
    words = [f"word{number}" for number in range(40)]
    ours = save_vocabulary(tmp_path / "ours", words, 40)
    theirs = save_vocabulary(tmp_path / "theirs", words[::-1], 40)
    with pytest.raises(OutlierMergeError) as caught:
        align("error", ours, theirs)
    assert "0 is 'word39', in ours 'word0'; 1 is 'word38', in ours 'word1'" in str(caught.value)
    assert "; 9 is 'word30', in ours 'word9'; and 30 more\n" in str(caught.value)


def test_two_models_that_use_a_reserved_row_for_other_tokens_are_refused(tmp_path):
    base = save_vocabulary(tmp_path / "base", WORDS, 16)
    sees = save_vocabulary(tmp_path / "sees", [*WORDS, "<image>"], 16)
    hears = save_vocabulary(tmp_path / "hears", [*WORDS, "<audio>"], 16)
    with pytest.raises(OutlierMergeError, match="10 is '<audio>', in sees '<image>'"):
        align("error", base, sees, hears)


@pytest.mark.parametrize("policy", ["base", "union"])
def test_one_token_in_two_reserved_rows_is_refused_or_matched(tmp_path, policy):
    base = save_vocabulary(tmp_path / "base", WORDS, 16)
    folders = []
    for name, id_ in (("ours", 12), ("theirs", 14)):
        folders.append(save_vocabulary(tmp_path / name, None, 16, seed=id_))
        words = {word: number for number, word in enumerate(WORDS)}
        (folders[-1] / "vocab.json").write_text(json.dumps({**words, "<x>": id_}))
        (folders[-1] / "added_tokens.json").write_text(json.dumps({"<x>": id_}))
    with pytest.raises(OutlierMergeError) as caught:
        align("error", base, *folders)
    assert "the same token has other ids: '<x>' is 14, in ours 12" in str(caught.value)
    alignment = align(policy, base, *folders, tokenizer=1 if policy == "base" else 0)
    row = 12 if policy == "base" else 10
    rows = [rows_after(folders[0], 12)[0], rows_after(folders[1], 14)[0]]
    assert torch.equal(values(alignment, 0)[row], (rows[0] + rows[1]) / 2)
    assert [torch.equal(values(alignment, n)[row], rows[n - 1]) for n in (1, 2)] == [True, True]


def test_common_refuses_to_cut_what_the_tokenizer_names(reference, with_image):
    with pytest.raises(OutlierMergeError) as caught:
        align("common", with_image, reference)
    assert str(caught.value) == (
        "`vocabulary: common` would cut rows that the tokenizer of with_image names: 2 tokens "
        "('<image>' 10, '<pad>' 11). The output keeps that tokenizer: use `vocabulary: base`."
    )


def test_common_refuses_to_cut_between_rows(tmp_path):
    ours = save_vocabulary(tmp_path / "ours", WORDS, 10)
    theirs = save_vocabulary(tmp_path / "theirs", [WORDS[0], *WORDS[2:]], 9)
    with pytest.raises(OutlierMergeError) as caught:
        align("common", ours, theirs)
    assert str(caught.value) == (
        "`vocabulary: common` can only cut rows at the end, but of ours other models lack 1 token "
        "('word1' 1). Use `vocabulary: base`."
    )


def test_union_refuses_ids_that_the_tokenizer_names_without_a_row(tmp_path, with_image):
    short = save_vocabulary(tmp_path / "short", [*WORDS, "<other>"], 10)
    with pytest.raises(OutlierMergeError) as caught:
        align("union", short, with_image)
    assert str(caught.value) == (
        "`vocabulary: union`: by the ids of the tokenizer of short the output needs 1 row (10) "
        "that no model has, which it has for 1 token ('<other>' 10). `tokenizer_source` takes "
        "another model's tokenizer."
    )
    ahead = save_vocabulary(tmp_path / "ahead", None, 10)
    words = {word: number for number, word in enumerate(WORDS)}
    (ahead / "vocab.json").write_text(json.dumps({**words, "<image>": 20, "<pad>": 21}))
    with pytest.raises(OutlierMergeError, match=r"needs 6 rows \(10–11, 16–19\) that no model has"):
        align("union", ahead, with_image)
    fits = save_vocabulary(tmp_path / "fits", [*WORDS, "<image>"], 10)
    assert align("union", fits, with_image).added_tokens == ((11, "<pad>", 1),)
    with pytest.raises(OutlierMergeError, match=r"beyond the output's 10 rows:\n  10: '<image>'"):
        align("base", fits, with_image)


def test_a_broken_tokenizer_is_refused_by_file(reference, with_image):
    (with_image / "tokenizer.json").write_text("{")
    with pytest.raises(
        OutlierMergeError, match=r"with_image/tokenizer\.json: the tokenizers library"
    ):
        align("base", reference, with_image)


# Notes


def test_notes_say_what_is_left_out_lacking_and_moved(tmp_path, reference):
    other = save_vocabulary(
        tmp_path / "other", [WORDS[1], WORDS[0], *WORDS[2:8], "<image>"], 13, seed=1
    )
    common = (
        "other lacks 2 tokens ('word8' 8, 'word9' 9) of reference: unchanged there",
        "other has other ids than reference for 2 tokens: matched by token",
    )
    assert align("base", reference, other).notes == (
        "left out of other: 1 token ('<image>' 8) and 4 padding rows (9–12)",
        *common,
    )
    assert align("union", reference, other).notes == (
        "left out of other: 2 padding rows (9–10)",
        *common,
        "added after the rows of reference, from other: 1 token ('<image>' 10)",
        "added after the rows of reference: 2 padding rows (11–12)",
        "1 token is added to the tokenizer",
    )


# The sources


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_picked_rows_keep_their_dtype_and_bytes(tmp_path, dtype):
    ours = save_vocabulary(tmp_path / "ours", WORDS, 12, dtype=dtype)
    theirs = save_vocabulary(tmp_path / "theirs", [*WORDS[::-1], "<a>"], 11, dtype=dtype, seed=1)
    alignment = align("union", ours, theirs)
    for number in (0, 1):
        source = alignment.checkpoints[number].tensors[EMBEDDINGS]
        assert source.dtype.name == source.out_dtype.name == str(dtype)[6:]
    stored = load(ours / "model.safetensors")[EMBEDDINGS]
    moved = load(theirs / "model.safetensors")[EMBEDDINGS]
    stored[10] = moved[10]  # reserved, and the first id that the tokenizer gives a new token
    assert torch.equal(values(alignment, 0), stored)
    assert torch.equal(values(alignment, 1)[:10], moved[:10].flip(0))


@pytest.mark.parametrize(
    ("dtypes", "computed"),
    [
        (("bfloat16", "bfloat16", "bfloat16"), "float32"),
        (("bfloat16", "float16", "float16"), "float32"),
        (("float32", "float64", "float32"), "float64"),
    ],
)
def test_means_are_float32_unless_a_model_is_float64(tmp_path, dtypes, computed):
    tokens = (WORDS, [*WORDS, "<a>"], [*WORDS, "<a>"])
    folders = [
        save_vocabulary(
            tmp_path / f"model{n}", tokens[n], len(tokens[n]), seed=n, dtype=getattr(torch, dtype)
        )
        for n, dtype in enumerate(dtypes)
    ]
    alignment = align("union", *folders)
    source = alignment.checkpoints[0].tensors[EMBEDDINGS]
    assert (source.dtype.name, source.out_dtype.name) == (computed, dtypes[0])
    expected = (rows_of(folders[1], None)[10] + rows_of(folders[2], None)[10]) / 2
    assert torch.equal(values(alignment, 0)[10], expected.to(getattr(torch, computed)))


@pytest.fixture(scope="module")
def scattered(tmp_path_factory):
    """A model with rows from everywhere, in several groups of rows."""
    root = tmp_path_factory.mktemp("scattered")
    words = [f"word{number}" for number in range(300)]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).tolist()
    folders = [
        save_vocabulary(root / "base", words, 310, columns=500),
        save_vocabulary(
            root / "turned", [*(words[n] for n in order[:290]), "<a>"], 300, columns=500, seed=1
        ),
        save_vocabulary(root / "third", [*words, "<a>"], 301, columns=500, seed=2),
    ]
    alignment = align("union", *folders)
    return alignment, [values(alignment, number).flatten() for number in range(3)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), number=st.integers(0, 2))
def test_any_span_is_that_of_the_whole(scattered, data, number):
    alignment, wholes = scattered
    whole = wholes[number]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 40_000)))
    with Reader() as reader:
        source = alignment.checkpoints[number].tensors[EMBEDDINGS]
        assert torch.equal(reader.values(source, start, stop), whole[start:stop])


def test_sources_name_the_stored_tensors_that_they_read(scattered):
    alignment, _ = scattered
    paths = {
        number: [meta.path.parent.name for meta in checkpoint.tensors[EMBEDDINGS].stored]
        for number, checkpoint in enumerate(alignment.checkpoints)
    }
    assert paths == {0: ["base", "turned", "third"], 1: ["turned", "base"], 2: ["third", "base"]}


def test_an_alignment_can_be_pickled_and_its_sources_hashed(scattered):
    alignment, wholes = scattered
    copy = pickle.loads(pickle.dumps(alignment))
    assert copy == alignment
    for number, whole in enumerate(wholes):
        assert torch.equal(values(copy, number).flatten(), whole)
        ours, theirs = (a.checkpoints[number].tensors[EMBEDDINGS] for a in (alignment, copy))
        assert hash(ours) == hash(theirs)
