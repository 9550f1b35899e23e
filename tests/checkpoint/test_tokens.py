"""The tokens that tokenizer files name, against the libraries that wrote them."""

from __future__ import annotations

import base64
import io
import json

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from outliermerge.checkpoint.tokens import read_tokens, same_token_files, token_files
from outliermerge.errors import OutlierMergeError

TEXTS = ["the quick brown fox jumps over the lazy dog", "merging models — de la même famille"] * 20


def trained(kind: str) -> Tokenizer:
    special = ["<unk>", "<s>"]
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    elif kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(
            vocab_size=100, special_tokens=special, show_progress=False
        )
    elif kind == "WordLevel":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["newword"])
    tokenizer.add_special_tokens(["<image>"])
    return tokenizer


def sentencepiece_model(
    kind: str, *, vocab_size: int, byte_fallback: bool, **options: object
) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=written,
        model_type=kind,
        vocab_size=vocab_size,
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def llama_model() -> bytes:
    return sentencepiece_model("bpe", vocab_size=340, byte_fallback=True)


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_tokenizer_json_names_what_the_tokenizers_library_does(tmp_path, kind):
    tokenizer = trained(kind)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = read_tokens(tmp_path)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    assert tokens == {number: tokenizer.id_to_token(number) for number in range(size)}
    assert "<image>" in tokens.values()
    assert len(tokens) > 15


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_tokenizer_model_names_what_the_sentencepiece_library_does(tmp_path, kind):
    model = sentencepiece_model(kind, vocab_size=100, byte_fallback=False)
    (tmp_path / "tokenizer.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = read_tokens(tmp_path)
    assert tokens == {n: processor.id_to_piece(n) for n in range(processor.get_piece_size())}
    assert "▁" in "".join(tokens.values())


def test_a_llama_vocabulary_is_the_same_before_and_after_its_conversion(tmp_path, llama_model):
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    slow.mkdir()
    (slow / "tokenizer.model").write_bytes(llama_model)
    (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    transformers.AutoTokenizer.from_pretrained(slow).save_pretrained(fast)
    assert token_files(fast)[0] == fast / "tokenizer.json"
    assert read_tokens(slow) == read_tokens(fast)
    assert {"<s>", "<0x0A>", "▁the"} <= set(read_tokens(slow).values())


def test_added_tokens_stand_beside_tokenizer_model(tmp_path, llama_model):
    (tmp_path / "tokenizer.model").write_bytes(llama_model)
    plain = read_tokens(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<image>": 340, "<old>": 341}')
    decoder = {"0": {"content": "<unknown>"}, "341": {"content": "<new>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert read_tokens(tmp_path) == plain | {0: "<unknown>", 340: "<image>", 341: "<new>"}


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model", "qwen.tiktoken"])
def test_a_tiktoken_file_names_tokens_as_a_byte_level_tokenizer_json_does(tmp_path, name):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, *20 * ["天地玄黄 🙂"]], trainer)
    byte_of = {sign: byte for byte, sign in bytes_to_unicode().items()}
    tokens = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    lines = [
        b"%s %d\n" % (base64.b64encode(bytes(map(byte_of.__getitem__, tokens[id_]))), id_)
        for id_ in range(len(tokens))
    ]
    (tmp_path / name).write_bytes(b"".join(lines))
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 300}')
    assert read_tokens(tmp_path) == tokens | {300: "<|end|>"}


CLASSES = {
    "T5": ("spiece.model", "T5Tokenizer", {"pad_token": "<pad>"}, {"pad_id": 0, "eos_id": 1,
           "unk_id": 2, "bos_id": -1}),
    "mT5": ("spiece.model", "T5TokenizerFast", {"extra_ids": 0}, {"pad_id": 0, "eos_id": 1,
            "unk_id": 2, "bos_id": -1}),
    "ALBERT": ("spiece.model", "AlbertTokenizer", {}, {"pad_id": 0, "unk_id": 1, "bos_id": -1,
               "eos_id": -1, "user_defined_symbols": ["[CLS]", "[SEP]", "[MASK]"]}),
    "XLNet": ("spiece.model", "XLNetTokenizer", {}, {"user_defined_symbols": ["<pad>", "<cls>",
              "<sep>", "<mask>", "<eop>", "<eod>"]}),
    "XLM-R": ("sentencepiece.bpe.model", "XLMRobertaTokenizer", {}, {}),
    "XLNet without its special pieces": ("spiece.model", "XLNetTokenizer", {}, {}),
    "XLNet with a word of its own": ("spiece.model", "XLNetTokenizer", {"sep_token": "[S]"},
                                     {"user_defined_symbols": ["<cls>"]}),
    "T5 without its special pieces": ("spiece.model", "T5Tokenizer", {}, {"bos_id": -1}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_pieces_get_the_ids_that_their_class_gives_them(tmp_path, kind):
    name, class_, more, options = CLASSES[kind]
    (tmp_path / name).write_bytes(
        sentencepiece_model("unigram", vocab_size=90, byte_fallback=False, **options)
    )
    config = {"tokenizer_class": class_} | more
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert {token: id_ for id_, token in read_tokens(tmp_path).items()} == loaded
    assert len(loaded) > 35


def test_pieces_of_a_class_that_is_not_known_are_not_guessed(tmp_path):
    model = sentencepiece_model("unigram", vocab_size=90, byte_fallback=False)
    (tmp_path / "spiece.model").write_bytes(model)
    assert read_tokens(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PegasusTokenizer"}')
    assert read_tokens(tmp_path) is None and token_files(tmp_path) == ()


@pytest.mark.parametrize("number", [-1, 1 << 21, 1 << 70, "many", True])
def test_a_number_of_sentinels_that_is_none_is_refused(tmp_path, number):
    model = sentencepiece_model("unigram", vocab_size=90, byte_fallback=False)
    (tmp_path / "spiece.model").write_bytes(model)
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": number}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(OutlierMergeError, match=r"extra_ids of tokenizer_config\.json is"):
        read_tokens(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "vocab.txt"])
@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_with_a_gap_before_them_are_refused(tmp_path, llama_model, name, file):
    """transformers 5 closes the gap, and gives the token another id than the file says."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    (tmp_path / name).write_bytes(
        {"tokenizer.model": llama_model, "vocab.json": json.dumps(vocabulary).encode(),
         "vocab.txt": "\n".join(vocabulary).encode()}[name]
    )  # fmt: skip
    first = len(read_tokens(tmp_path))

    def add(**ids: int) -> None:
        content = dict(ids)
        if file == "tokenizer_config.json":
            decoder = {str(id_): {"content": token} for token, id_ in ids.items()}
            content = {"added_tokens_decoder": decoder}
        (tmp_path / file).write_text(json.dumps(content))

    add(**{"<x>": first, "<y>": first + 1})
    assert len(read_tokens(tmp_path)) == first + 2
    add(**{"<x>": first, "<y>": first + 2})
    said = f"token '<y>' has the id {first + 2}, and no token has {first + 1}: transformers 5"
    with pytest.raises(OutlierMergeError, match=said):
        read_tokens(tmp_path)


@pytest.mark.parametrize("gap", [0, 1, 5])
def test_a_loader_closes_gaps_before_added_tokens(tmp_path, llama_model, gap):
    (tmp_path / "tokenizer.model").write_bytes(llama_model)
    first = len(read_tokens(tmp_path))
    decoder = {str(first + gap): {"content": "<new>", "special": True}}
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert loaded["<new>"] == first
    if gap == 0:
        assert {token: id_ for id_, token in read_tokens(tmp_path).items()} == loaded
    else:
        with pytest.raises(OutlierMergeError, match="'<new>' has the id"):
            read_tokens(tmp_path)


def test_tiktoken_leaves_gaps_before_added_tokens(tmp_path):
    lines = [b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 300}')
    assert read_tokens(tmp_path)[300] == "<|end|>"


def test_an_id_in_tokenizer_json_that_no_table_could_have_is_refused(tmp_path):
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str()
    content = made.replace('"b":1', '"b":2147483648')  # tokenizers would count up to it
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(OutlierMergeError, match="'b' has the id 2,147,483,648, expected ids"):
        read_tokens(tmp_path)


def test_vocab_json_and_its_added_tokens(tmp_path):
    trained("BPE").model.save(str(tmp_path))
    expected = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": len(expected)}))
    tokens = {id_: token for token, id_ in expected.items()}
    assert read_tokens(tmp_path) == tokens | {len(expected): "<image>"}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("closed", [True, False])
def test_vocab_txt_has_a_token_a_line_whatever_the_token_is(tmp_path, end, closed):
    lines = ["[PAD]", "a\u2028b", "\u00a0", "##é"]
    text = end.join(lines) + (end if closed else "")
    (tmp_path / "vocab.txt").write_bytes(text.encode())
    assert read_tokens(tmp_path) == dict(enumerate(lines))


def test_tokenizer_json_is_preferred_to_other_vocabularies(tmp_path):
    trained("WordLevel").save(str(tmp_path / "tokenizer.json"))
    alone = read_tokens(tmp_path)
    for name in ("vocab.json", "vocab.txt", "tokenizer.model"):
        (tmp_path / name).write_text("broken")
    assert read_tokens(tmp_path) == alone


def test_a_folder_without_tokenizer_files_has_no_tokens(tmp_path):
    (tmp_path / "added_tokens.json").write_text('{"<image>": 1}')
    assert read_tokens(tmp_path) is None
    assert read_tokens(tmp_path / "added_tokens.json") is None
    assert read_tokens(tmp_path / "absent") is None


def test_tokenizer_files_are_compared_by_what_they_add(tmp_path):
    folders = []
    for name in ("a", "b"):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "vocab.txt").write_text("a\nb\n")
        (folders[-1] / "added_tokens.json").write_text('{"<image>": 2}')
        (folders[-1] / "special_tokens_map.json").write_text('{"eos_token": "a"}')
    assert same_token_files(*folders)
    (folders[1] / "added_tokens.json").write_text('{"<other>": 2}')
    assert not same_token_files(*folders)
    (folders[1] / "added_tokens.json").unlink()
    assert not same_token_files(*folders)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("vocab.json", b'{"a": "b"}', "'a' with id 'b' is not a token"),
        ("vocab.txt", b"\xff\xfe", "can't decode byte"),
        ("tokenizer.model", b"", "it has no pieces"),
        ("tokenizer.model", b"IQ== 0\nIg=! 1\n", "no tiktoken file: line 2: "),
        ("tokenizer.model", b"IQ== 0\nIg== x\n", "no tiktoken file: line 2: invalid literal"),
        ("qwen.tiktoken", b"IQ== 0\nIg== 2097152\n", "has the id 2,097,152, expected ids below"),
        ("tiktoken.model", b"IQ== -1\n", "line 1: '!' with id -1 is not a token"),
        ("vocab.json", b'{"a": 2097152}', "'a' has the id 2,097,152, expected ids below 2,097,152"),
        ("vocab.txt", b"\n" * (1 << 21), "it has 2,097,152 tokens or more"),
        ("tokenizer.model", b"\x0a\x05\x0a\x01", "it ends within a field"),
        ("tokenizer.model", b"\x0a", "it ends within a number"),
        ("tokenizer.model", b"\x08" + b"\xff" * 11, "a number is too long"),
        ("tokenizer.model", b"\x0a\x02\x10\x01", "piece 0 has no text"),
        (
            "tokenizer.model",
            b"\x0a\x85\x80\x04\x0a\x81\x80\x04" + b"x" * 65537,
            "piece 0 has 65,537 bytes, expected at most 65,536",
        ),
        ("tokenizer.model", b"\x0b", "wire type 3 at byte 1"),
        ("tokenizer.model", b"\x0a\x03\x0a\x01\xff", "can't decode byte"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(OutlierMergeError) as caught:
        read_tokens(tmp_path)
    assert str(caught.value).startswith(f"{path}: not a tokenizer file that can be read: ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("Fetch it again.")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("added_tokens.json", "[]", "it holds no JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "'x'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "a"}}', "None with id 1"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": [1]}',
            "added_tokens_decoder is not an object",
        ),
    ],
)
def test_broken_added_tokens_are_refused(tmp_path, name, content, reason):
    (tmp_path / "vocab.txt").write_text("a\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(OutlierMergeError) as caught:
        read_tokens(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: not a tokenizer file")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "EOF while parsing"),
        (b"\xff", "can't decode byte"),
        (b"[]", "expected struct Tokenizer"),
        (b'{"version": "1.0"}', "Model missing"),
        (b'{"model": {"vocab": "a"}}', "did not match any variant"),
        (b'{"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}', "-1"),
        (b"[" * 100_000, "line 1 column 1"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_loaded_is_refused(tmp_path, content, reason):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(OutlierMergeError) as caught:
        read_tokens(tmp_path)
    where = f"{tmp_path / 'tokenizer.json'}: the tokenizers library cannot load it: "
    assert str(caught.value).startswith(where)
    assert reason in str(caught.value)


def test_two_tokens_with_one_id_are_refused(tmp_path):
    """The library counts the vocabulary's words, not their ids, where these leave gaps."""
    content = json.loads(Tokenizer(models.WordLevel({"a": 0, "b": 2}, unk_token="a")).to_str())
    content["added_tokens"] = [_entry(3, "<x>")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(OutlierMergeError, match=r"gives '.*' and '.*' one id, 2,"):
        read_tokens(tmp_path)


def _entry(id_: int, content: str) -> dict:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": id_, "content": content} | dict.fromkeys(flags, False)


@pytest.mark.parametrize("ids", [(6, 7), (7, 6), (40, 90), (0, 1)])
def test_a_loader_numbers_added_tokens_itself(tmp_path, ids):
    words = {f"w{number}": number for number in range(6)}
    content = json.loads(Tokenizer(models.WordLevel(words, unk_token="w0")).to_str())
    content["added_tokens"] = [_entry(ids[0], "<x>"), _entry(3, "w2"), _entry(ids[1], "<y>")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    expected = {number: word for word, number in words.items()} | {6: "<x>", 7: "<y>"}
    assert read_tokens(tmp_path) == expected


DECODER = {"9": {"content": "<z>", "special": True}, "7": {"content": "<y>", "special": True}}


@pytest.mark.parametrize(
    ("config", "added", "named", "expected"),
    [
        ({"added_tokens_decoder": DECODER}, {}, {}, ["<a>", "<y>", "<z>"]),
        ({"added_tokens_decoder": DECODER}, {"<q>": 6}, {"pad_token": "<p>"}, None),
        ({}, {"<q>": 6}, {"pad_token": "<p>"}, ["<a>", "<q>", "<p>"]),
        ({"pad_token": "<p>", "extra_special_tokens": ["<e>"]}, {}, {}, ["<a>", "<p>", "<e>"]),
        ({"additional_special_tokens": ["<e>", "<a>"]}, {}, {}, ["<a>", "<e>"]),
        ({"pad_token": {"content": "<p>", "__type": "AddedToken"}}, {}, {}, ["<a>", "<p>"]),
        ({"pad_token": "w3", "eos_token": None}, {}, {}, ["<a>"]),
        ({"extra_special_tokens": {"image_token": "<image>"}}, {}, {}, ["<a>", "<image>"]),
    ],
)
def test_transformers_adds_what_the_files_beside_name(tmp_path, config, added, named, expected):
    content = json.loads(Tokenizer(models.WordLevel({"w0": 0, "w3": 1}, unk_token="w0")).to_str())
    content["added_tokens"] = [_entry(2, "<a>")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if added:
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    if named:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    tokens = read_tokens(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert tokens == {id_: token for token, id_ in sorted(loaded.items(), key=lambda p: p[1])}
    assert list(tokens.values())[2:] == (expected or ["<a>", "<y>", "<z>"])


def test_a_special_token_without_an_id_comes_behind_a_slow_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<p>", "unk_token": "a"}')
    assert read_tokens(tmp_path) == {0: "a", 1: "b", 2: "<p>"}


@pytest.mark.parametrize("cut", [1, 100, 1000, 2500])
def test_a_sentencepiece_model_that_ends_early_is_refused(tmp_path, cut):
    model = sentencepiece_model("bpe", vocab_size=100, byte_fallback=False)
    (tmp_path / "tokenizer.model").write_bytes(model[:-cut])
    with pytest.raises(OutlierMergeError, match="it ends within a"):
        read_tokens(tmp_path)


def test_a_git_lfs_pointer_is_told_apart(tmp_path):
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(OutlierMergeError, match="a Git LFS pointer"):
        read_tokens(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("a\n")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("outliermerge.storage.stamps.os.open", refuse)
    with pytest.raises(OutlierMergeError, match=r"vocab\.txt: cannot be read: Permission denied"):
        read_tokens(tmp_path)
