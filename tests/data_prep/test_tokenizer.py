from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli, tokenizer
from data_prep.errors import UserError
from data_prep.shard import build
from data_prep.sources.trails import Trails
from data_prep.tokenizer import train_tokenizer, training_texts

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")


def trails_texts(count: int = 200) -> Iterator[str]:
    source = Trails()
    for row in range(count):
        yield from training_texts(source.example("train", row))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(trails_texts(), out, 640)
    return out


@pytest.fixture(scope="module")
def trained(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text("\u2581 <0x41>\n{}A\r\t\x00é日"), st.text("<|im_end>unk ")))
def test_any_text_survives(trained: Any, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_words_of_trails_are_single_tokens(trained: Any) -> None:
    text = "Start at the red blue flag and follow 13 arrows. Which flag is reached?"
    assert trained.tokenize(text) == [
        "Start", " at", " the", " red", " blue", " flag", " and", " follow", " ", "1", "3", " arrows", ".",
        " Which", " flag", " is", " reached", "?",
    ]  # fmt: skip
    for words in (
        "{purple brown}",
        "(A).{yellow pink}",
        " orange points left to green",
        "\n(B).{up}\n(C).{down}",
    ):
        assert len(trained.tokenize(words)) == len(tokens(words))
    assert trained.tokenize("Therefore, the answer is B") == [
        "Therefore",
        ",",
        " the",
        " answer",
        " is",
        " B",
    ]


def tokens(words: str) -> list[str]:
    import re

    return re.findall(r" ?\w+|[^\w ]", words)


def test_same_pieces_as_sentencepiece(folder: Path, trained: Any) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in [*trails_texts(30), "unseen wordings, arrowless  greenish\nzebras {x}(y) 42 é"]:
        assert trained.encode(text) == processor.encode(text)


def test_special_tokens_and_template(trained: Any) -> None:
    assert (trained.eos_token, trained.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for token in tokenizer.KINDS["qwen"].special:
        assert trained.tokenize(token) == [token]
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
    shown = trained.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert shown == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert trained.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == (
        "<|im_start|>user\na<|im_end|>\n"
    )


def test_kind_of_chameleon(tmp_path: Path) -> None:
    made = train_tokenizer(trails_texts(), tmp_path / "a", 450, "chameleon")
    assert len(made) == 450 and made.chat_template is None
    assert (made.bos_token, made.eos_token, made.pad_token, made.sep_token) == (
        "<s>",
        "</s>",
        "<pad>",
        "<reserved08706>",
    )
    for token in ("<image>", "<racm3:break>", "<eoss>"):
        assert made.tokenize(token) == [token] and token in made.all_special_tokens
    with pytest.raises(UserError, match="--kind llama: expected one of qwen, chameleon"):
        train_tokenizer(trails_texts(), tmp_path / "b", 450, "llama")


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(trails_texts(), tmp_path, 640)
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_vocabulary_sizes(tmp_path: Path) -> None:
    assert len(train_tokenizer(trails_texts(), tmp_path / "a", 450)) == 450
    assert 450 < len(train_tokenizer(trails_texts(), tmp_path / "b", 50_000)) < 1000
    with pytest.raises(UserError, match="cannot learn 293 pieces"):
        train_tokenizer(trails_texts(), tmp_path / "c", 300)
    with pytest.raises(UserError, match="there is no text"):
        train_tokenizer([], tmp_path / "d", 500)
    for size in (-5, 0, 7):
        with pytest.raises(UserError, match=f"--vocab_size {size}: expected more than the 7 special tokens"):
            train_tokenizer(["a text"], tmp_path / "e", size)
    with pytest.raises(UserError, match="cannot learn 999999999993 pieces"):
        train_tokenizer(["a text"], tmp_path / "f", 10**12)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("trails", tmp_path / "data", options={"train": 60, "val": 0, "test": 0})
    cli.run(tokenizer.main, [f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'tok'}", "--vocab_size=500"])
    assert capsys.readouterr().out == f"500 tokens written to {tmp_path / 'tok'}\n"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a few words of text\nand a few more words\n")
    cli.run(tokenizer.main, [f"--corpus={corpus}", f"--out={tmp_path / 'small'}", "--vocab_size=400"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give either --data, a shard folder, or --corpus"),
        (["--data", "nowhere"], "the shard folder nowhere is not there; make it with python -m data_prep.shard"),
        (["--data", __file__], f"the shard folder {__file__} is a file, not a folder; make it with"),
        (["--corpus", "nowhere"], "--corpus nowhere: cannot be read"),
    ],
)
def test_command_mistakes(words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(tokenizer.main, ["--out", str(tmp_path), "--vocab_size", "500", *words])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")
