"""Every example in a docstring of the schema runs and shows what it says."""

import doctest
import importlib
import pkgutil

import pytest

import shared_schema

MODULES = [
    module.name
    for module in pkgutil.walk_packages(shared_schema.__path__, "shared_schema.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_a_modules_examples_show_what_they_say(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_merging_has_examples():
    finder = doctest.DocTestFinder()
    found = finder.find(importlib.import_module("shared_schema.merging"))
    assert {t.name.rpartition(".")[2] for t in found if t.examples} == {"merge", "splice"}
