"""Words for datatrove's filters and its minhash without spaCy, jieba and the other segmenters."""

from collections.abc import Iterator

import regex
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

# A word with its combining marks and what joins its parts (don't, 3.5, well-known), or one sign: near to
# spaCy's, with which FineWeb's thresholds were set.
WORD = regex.compile(r"\w+(?:[.,:'’&/-]\w+)*|\.{2,}|-{2,}|[^\w\s]")  # noqa: RUF001
# Scripts that write no spaces between words.
NO_SPACES = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


class Words(WhitespaceTokenizer):
    """Words and signs between spaces; of scripts without spaces each character is a word."""

    def word_tokenize(self, text: str) -> list[str]:
        return list(_words(text))


def _words(text: str) -> Iterator[str]:
    for word in WORD.findall(text):
        if word[0] > "\u0dff" and NO_SPACES.search(word):
            yield from word
        else:
            yield word


WORDS = Words()  # one for all filters: datatrove keeps the words of a text by its tokenizer
