"""Text becomes sentences, in windows that the splitter can take."""

from __future__ import annotations

import sentencex

from minilm.data.builder import sentences
from minilm.data.builder.sentences import WINDOW, split_sentences


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
