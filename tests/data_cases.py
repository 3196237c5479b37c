"""Tiny texts and a tiny tokenizer for the tests of data/; every file is made here, nothing is fetched."""

import os
import random
import struct
import threading
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minilm.data.builder.build import build

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PAD, UNK, CLS, SEP = 0, 1, 2, 3


def make_tokenizer(folder: Path, *, extra_tokens: int = 0) -> str:
    """A WordPiece tokenizer that cuts words into letters, with truncation and padding on, as published ones
    have."""
    vocab = [*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS), *(f"[x{i}]" for i in range(extra_tokens))]
    model = models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_id=PAD, pad_token="[PAD]")
    names = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


def prefetch_threads() -> set[threading.Thread]:
    """This process's threads of `prefetch`, whatever other threads there are."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("minilm-prefetch")}


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 60 words; no two alike."""
    rng = random.Random(seed)
    return [
        f"d{i} "
        + " ".join("".join(rng.choices(LETTERS, k=rng.randint(1, 5))) for _ in range(rng.randint(0, 59)))
        for i in range(count)
    ]


def make_data(folder: Path, *, documents: int = 60, seq_len: int = 16, **arguments) -> Path:
    """A small data set of several shards, the last block short."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder / "tokenizer")
    text = folder / "text.txt"
    text.write_text("\n\n".join(make_documents(documents)))
    options = {"rows_per_block": 7, "shard_bytes": 40_000, "processes": 1, **arguments}
    build([text], tokenizer, folder / "data", seq_len=seq_len, **options)
    return folder / "data"


def write_megatron(prefix, documents, dtype="<u2", code=8, modes=False):
    """Documents are lists of sequences of ids; written from the layout table."""
    sequences = [s for document in documents for s in document]
    bounds = np.cumsum([0, *(len(document) for document in documents)])
    lengths = [len(s) for s in sequences]
    width = np.dtype(dtype).itemsize
    pointers = (np.cumsum([0, *lengths])[:-1] * width).astype("<i8")
    raw = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    raw += np.array(lengths, "<i4").tobytes() + pointers.tobytes() + bounds.astype("<i8").tobytes()
    raw += bytes(len(sequences)) if modes else b""
    prefix.with_suffix(".idx").write_bytes(raw)
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    return prefix


def in_a_child(work):
    """What `work()` returns, from a process of its own that may die of a signal; or that signal, negative."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(send, str(work()).encode())
        finally:
            os._exit(0)
    os.close(send)
    status = os.waitpid(child, 0)[1]
    answer = os.read(receive, 4000).decode()
    os.close(receive)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else answer
