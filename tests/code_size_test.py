"""The package stays within the budgets that make it readable."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import code_size


def test_the_package_and_its_core_keep_to_their_budgets():
    assert code_size.count_lines("") <= code_size.PACKAGE_BUDGET
    assert code_size.count_lines(*code_size.CORE) <= code_size.CORE_BUDGET


def test_no_class_is_long():
    longest = code_size.classes()[0]
    assert longest.size <= code_size.LONGEST_CLASS, longest


def test_few_functions_are_wide():
    wide = code_size.wide_functions()
    assert len(wide) <= code_size.MOST_WIDE_FUNCTIONS, wide
