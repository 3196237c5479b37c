"""Tokenizers of each kind that can be cut, trained on a text in three alphabets, as folders of `transformers`."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

ALPHABETS = ("abcdefghijklmnopqrstuvwxyz", "αβγδεζηθικλμνξοπρστυφχψω", "абвгдежзийклмнопрстуфхцчшщ")
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def lines(count: int, seed: int, languages: tuple[int, ...] = (0, 1, 2)) -> Iterator[str]:
    """Lines of made-up words, few of them common and many rare; each line in one of the languages."""
    words = {}
    for language in languages:
        rng = random.Random(language)
        syllables = ["".join(rng.choices(ALPHABETS[language], k=rng.randint(1, 3))) for _ in range(60)]
        words[language] = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(3000)]
    rng = random.Random(seed)
    for number in range(count):
        own = words[languages[number % len(languages)]]
        yield " ".join(own[int(len(own) * rng.random() ** 3)] for _ in range(rng.randint(3, 15))) + "."


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=list(BERT), show_progress=False)
    tokenizer.train_from_iterator(lines(1500, 1), trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def bpe() -> Tokenizer:
    """Of bytes, as RoBERTa has it, with its mask token behind the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(ROBERTA[:-1]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(1500, 1), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.add_tokens(["abra-cadabra"])
    return tokenizer


def unigram(text: Iterable[str] = (), size: int = 2000) -> Tokenizer:
    """As XLM-R has it: special tokens first, the mask among them. text: instead of the made-up one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=list(ROBERTA), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(text or lines(1500, 1), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


MAKERS = {"wordpiece": wordpiece, "bpe": bpe, "unigram": unigram}


def save(tokenizer: Tokenizer, folder: Path, kind: str) -> None:
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), BERT, strict=True))
    if kind != "wordpiece":
        names = dict(zip(("cls", "pad", "sep", "unk", "mask"), ROBERTA, strict=True))
    named = {f"{name}_token": token for name, token in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
