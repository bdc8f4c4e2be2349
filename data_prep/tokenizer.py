"""Command: train a small tokenizer for models from scratch (`python -m data_prep.tokenizer --help`).

SentencePiece learns byte-pair pieces from the prompts and rationales of a shard folder's train split (or of a
text file); the result is saved as a transformers fast tokenizer with the special tokens of a model family, and as
SentencePiece's own `tokenizer.model`.

Any text survives encoding and decoding: what is not in the vocabulary is spelled in bytes, and spaces stay
spaces (SentencePiece's own mark for them, U+2581, would be lost where a text contains it).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep import cli
from data_prep.errors import UserError
from data_prep.example import Example
from data_prep.files import write_atomic
from data_prep.reader import BadSample, open_split
from data_prep.storage import Location

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"

# Qwen2-VL's template without video, numbered pictures and the default system turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}{{ '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}
"""


@dataclass(frozen=True)
class Kind:
    """What a model family's tokenizer has besides its pieces."""

    special: tuple[str, ...]
    roles: dict[str, str]
    """transformers' name of a role, such as `eos_token` -> one of them"""
    chat_template: str | None = None


KINDS = {
    "qwen": Kind(
        (END, TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE, VIDEO),
        {"eos_token": TURN_END, "pad_token": END},
        CHAT_TEMPLATE,
    ),
    "chameleon": Kind(
        ("<s>", "<pad>", "</s>", "<eoss>", "<racm3:break>", "<image>", "<reserved08706>"),
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "sep_token": "<reserved08706>"},
    ),
}
LETTERS = "ABCDEFGH"
_ALONE = "\n{}()[]"
"""Characters that are never part of a longer piece, so that a word is the same token beside a bracket."""
_SPACE_MARK = "\u2581"
_UNKNOWN = "<unk>"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def training_texts(example: Example) -> Iterator[str]:
    """The texts of a question as a model is going to see them."""
    options = "\n".join(f"({LETTERS[i % len(LETTERS)]}).{{{choice}}}" for i, choice in enumerate(example.choices))
    yield f"[Question]:{{{example.question}}}\n[Options]:\n{options}\nAnswer:\n"
    yield f"Therefore, the answer is {LETTERS[example.answer % len(LETTERS)]}"
    yield from (text for text in (example.rationale, example.context) if text)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """A serialized SentencePiece model of `vocab_size` pieces, or of fewer if the texts do not give as many.

    Raises:
        UserError: no text, or a `vocab_size` too small for the characters of the texts.
    """
    import sentencepiece

    printable = "".join(chr(code) for code in range(ord("!"), ord("~") + 1))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",  # unigram leaves words whole only where they share parts with other words
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            required_chars="".join(char for char in printable if char not in _ALONE),
            user_defined_symbols=list(_ALONE),
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1_000_000,
            unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
            num_threads=1,  # the same pieces on every machine
            minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError, ValueError) as error:  # ValueError: a number that is none to SentencePiece
        reason = str(error).rpartition("] ")[2] or "there is no text"
        raise UserError(f"SentencePiece cannot learn {vocab_size} pieces from these texts: {reason}") from error
    return model.getvalue()


def wrap(model: bytes, kind: Kind) -> PreTrainedTokenizerFast:
    """A transformers fast tokenizer of this kind with the pieces of a model made by `train_sentencepiece`."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(id).replace(_SPACE_MARK, " ") for id in range(processor.vocab_size())]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    bpe = models.BPE(vocabulary, _merges(vocabulary), unk_token=_UNKNOWN, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in kind.special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[token for token in kind.special if token not in kind.roles.values()],
        chat_template=kind.chat_template,
        clean_up_tokenization_spaces=False,
        **kind.roles,
    )


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, best piece first, as SentencePiece joins them."""
    merges = []
    for piece in vocabulary:  # ids rise as SentencePiece's scores fall
        if piece not in _BYTES and piece != _UNKNOWN:
            cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
            merges += [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
    return merges


def train_tokenizer(texts: Iterable[str], out: Path, vocab_size: int, kind: str = "qwen") -> PreTrainedTokenizerFast:
    """Train on `texts`, save the tokenizer and `tokenizer.model` in the folder `out`, and return it.

    `vocab_size` counts the special tokens of this `kind` too; the vocabulary is smaller where the texts have fewer
    pieces.

    Raises:
        UserError: an unknown kind, no text, a `vocab_size` too small, or an `out` that cannot be written.
    """
    if kind not in KINDS:
        raise UserError(f"--kind {kind}: expected one of {', '.join(KINDS)}")
    special = KINDS[kind].special
    if vocab_size <= len(special):
        raise UserError(f"--vocab_size {vocab_size}: expected more than the {len(special)} special tokens")
    model = train_sentencepiece(texts, vocab_size - len(special))
    tokenizer = wrap(model, KINDS[kind])
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "tokenizer.model", model)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return tokenizer


def texts_of_folder(data: Location, cache_gb: float | None = None) -> Iterator[str]:
    """The training texts of a shard folder's train split; samples that went bad are left out and named.

    Raises:
        UserError: no sound shard folder.
    """
    index = open_split(data, "train", cache_gb)
    for position in range(len(index)):
        try:
            yield from training_texts(index.read(position))
        except BadSample as error:
            print(f"skipped {error}", file=sys.stderr)


def texts_of_file(corpus: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(corpus, encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--corpus {corpus}: cannot be read as UTF-8 text ({error})") from None


def main(
    *, out: Path, vocab_size: int, data: Location | None = None, corpus: Path | None = None, kind: str = "qwen"
) -> None:
    """Train a small tokenizer for models from scratch, on a shard folder (--data) or a text file (--corpus).

    --kind: whose special tokens it has, qwen or chameleon.

    Example: python -m data_prep.tokenizer --data data/trails --vocab_size 640 --out tokenizer
    """
    if (data is None) == (corpus is None):
        raise UserError("give either --data, a shard folder, or --corpus, a text file")
    texts = texts_of_folder(data) if data else texts_of_file(corpus) if corpus else iter(())
    tokenizer = train_tokenizer(texts, out, vocab_size, kind)
    print(f"{len(tokenizer)} tokens written to {out}")


if __name__ == "__main__":
    cli.run(main)
