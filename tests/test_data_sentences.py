"""Text becomes sentences, in windows that the splitter can take."""

from __future__ import annotations

import json

import pytest
import sentencex

from minilm.data.builder import sentences
from minilm.data.builder.build import build
from minilm.data.builder.sentences import WINDOW, split_sentences
from minilm.data.errors import DataError
from minilm.data.format.manifest import BUILD_FILE, load_manifest


def test_the_splitter_is_given_no_long_text(monkeypatch):
    """Its time grows with the square of the length of a text that is not of ASCII."""
    given: list[str] = []
    segment = sentencex.segment

    def recorder(language: str, text: str):
        given.append(text)
        return segment(language, text)

    monkeypatch.setattr(sentences.sentencex, "segment", recorder)
    for text in ("你好。" * 9000, "One two. " * 5000, "x" * 40000, "Ω" * 3 + " y" * 20000, "a\nb. " * 9000):
        given.clear()
        found = split_sentences(text)
        assert "".join(given) == text and max(map(len, given)) <= WINDOW
        assert "".join(found) == text
    assert split_sentences("你好。" * 9000) == ["你好。"] * 9000
    assert len(split_sentences("One two. " * 5000)) == 5000
    assert split_sentences("") == []


def test_each_language_ends_its_sentences_by_its_own_rules():
    german, russian = "Am 3. Januar kam Dr. Meier. Er blieb.", "Он родился в 1990 г. в Москве. Да."
    assert split_sentences(german, "de") == ["Am 3. Januar kam Dr. Meier. ", "Er blieb."]
    assert split_sentences(german)[0] == "Am 3. "
    assert split_sentences(russian, "ru") == ["Он родился в 1990 г. в Москве. ", "Да."]
    assert split_sentences("One. Two.", "tlh") == ["One. ", "Two."]  # by the rules of English


def test_a_data_set_is_of_a_language(teacher, tmp_path):
    (tmp_path / "text.txt").write_text("Am 3. Januar time year. Er people way.\n\n" * 4)
    arguments = {"seq_len": 32, "packing": "sentence", "processes": 1}
    for language in ("en", "de"):
        build([tmp_path / "text.txt"], str(teacher), tmp_path / language, language=language, **arguments)
    found = {code: load_manifest(tmp_path / code) for code in ("en", "de")}
    assert (found["en"].rows, found["de"].rows) == (12, 8)
    assert found["en"].fingerprint != found["de"].fingerprint
    recorded = {code: json.loads((tmp_path / code / BUILD_FILE).read_text())["arguments"] for code in found}
    assert "language" not in recorded["en"], "data sets from before there were others stay what they are"
    assert recorded["de"] == recorded["en"] | {"language": "de"}
    for language, other in (("en", "de"), ("de", "en")):
        with pytest.raises(DataError, match=r"built differently \(language changed\)"):
            build([tmp_path / "text.txt"], str(teacher), tmp_path / language, language=other, **arguments)
    with pytest.raises(
        DataError, match="language 'German' is no code of a language; allowed: small letters, as"
    ):
        build([tmp_path / "text.txt"], str(teacher), tmp_path / "x", language="German", **arguments)
    with pytest.raises(
        DataError, match="'de' says how sentences end, and packing 'full' splits none; give packing"
    ):
        build([tmp_path / "text.txt"], str(teacher), tmp_path / "x", language="de", processes=1)
