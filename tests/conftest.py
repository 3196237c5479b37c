"""Small real inputs that every test can share: a text, a trained WordPiece tokenizer, a BERT teacher, shards."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's own 15 lets a busy machine starve a test's workers for minutes
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they give
os.environ.pop("MLFLOW_TRACKING_URI", None)

import pytest
import torch

from tests.teachers import teachers_stay

if (
    not torch.cuda.is_available()
):  # before anything imports triton: its interpreter runs the GPU kernels' tests
    os.environ.setdefault("TRITON_INTERPRET", "1")

WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book eye
job word business issue side kind head house service
""".split()  # noqa: SIM905 (a list of words, one a line, would be a screen long)


def write_text(path: Path, documents: int, seed: int = 0) -> Path:
    """A text file of `documents` paragraphs of common English words, a blank line between them."""
    rng = random.Random(seed)
    paragraphs = (" ".join(rng.choices(WORDS, k=rng.randint(20, 120))) + "." for _ in range(documents))
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def make_teacher(
    folder: Path, *, layers: int = 3, hidden: int = 48, heads: int = 4, extra_words: tuple[str, ...] = ()
):
    """A BERT with random weights large enough to give sharp attention, and its WordPiece tokenizer, as a folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS, ".", *extra_words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        BertModel(config).save_pretrained(folder)
    return folder


def make_embedder(folder: Path, *, pooling: str = "mean", dense: int | None = None) -> Path:
    """Turn a teacher's folder into one of sentence-transformers, with a dense layer of random weights if asked for."""
    from minilm.model.encoder.sentence_head import SentenceHead, save_head
    from minilm.model.encoder.sentence_layout import DenseLayer, SentenceLayout

    layers = (DenseLayer(48, dense, activation="Tanh"),) if dense else ()
    head = SentenceHead(SentenceLayout(pooling, layers), seed=3)
    for linear in head.linear:
        torch.nn.init.normal_(linear.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    save_head(head, folder, 48, 64)
    return folder


@pytest.fixture(autouse=True)
def unchanged_teachers() -> Iterator[None]:
    """Whatever a test runs: no step of the loop touches the teacher."""
    with teachers_stay():
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.txt", documents=120)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "bert")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, text: Path, teacher: Path) -> Path:
    """Rows of 32 tokens, with a held-out split."""
    from minilm.data.builder.build import build

    out = tmp_path_factory.mktemp("shards") / "words"
    build([text], str(teacher), out, seq_len=32, held_out=0.1, seed=0, processes=1)
    return out


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory, text: Path, teacher: Path) -> Path:
    """Rows of at most 64 tokens, a document's piece each: most have padding. With a held-out split."""
    from minilm.data.builder.build import build

    out = tmp_path_factory.mktemp("documents") / "words"
    build([text], str(teacher), out, seq_len=64, packing="document", held_out=0.1, seed=0, processes=1)
    return out


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory, text: Path, teacher: Path) -> Path:
    """Rows of 64 tokens that hold several documents, and a held-out split."""
    from minilm.data.builder.build import build

    out = tmp_path_factory.mktemp("masked") / "words"
    build([text], str(teacher), out, seq_len=64, packing="masked", held_out=0.1, seed=0, processes=1)
    return out


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, made once, to be copied: making them takes a second."""
    from minilm.orchestrator.tracking.client import connect

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole clusters first: a long test that begins last leaves the other processor without work."""
    items.sort(key=lambda item: not item.path.name.startswith("test_launch_"))
