"""The examples in the docstrings."""

import doctest
import importlib

import pytest

MODULES = """
    tokenizer utils generate train prepare explore system.settings system.errors corpus.bpe
    corpus.clean corpus.documents corpus.download corpus.folder corpus.text training.run_log
    viz.verdict
"""


@pytest.mark.parametrize("name", MODULES.split())
def test_docstring_examples(name: str):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
