"""Text to ids and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import UserError
from tokenizer import CharTokenizer, from_dict


def test_ids_follow_the_sorted_characters():
    tokenizer = CharTokenizer.train("hello, wörld\n")
    assert tokenizer.chars == sorted(set("hello, wörld\n"))
    assert tokenizer.encode("\n ,").tolist() == [0, 1, 2]
    assert tokenizer.vocab_size == 11


@given(st.text(min_size=1))
def test_decode_undoes_encode(text: str):
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(min_size=1), st.text())
def test_a_tokenizer_survives_its_dict(text: str, other: str):
    tokenizer = CharTokenizer.train(text)
    copy = from_dict(tokenizer.to_dict())
    assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert copy.unknown(other) == sorted(set(other) - set(text))


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match="'z', 'ü'"):
        CharTokenizer.train("abc").encode("abzcü")


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="'magic'"):
        from_dict({"kind": "magic"})
