"""The examples in the docstrings."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer",
        "utils",
        "corpus.documents",
        "corpus.text",
        "corpus.folder",
        "system.settings",
        "system.errors",
        "corpus.download",
        "corpus.bpe",
        "corpus.clean",
        "prepare",
        "generate",
        "train",
        "training.run_log",
        "explore",
        "viz.internals",
        "experiments.comparison",
        "experiments.optimizers",
        "experiments.sampling",
        "experiments.speedrun",
    ],
)
def test_docstring_examples(name: str):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
