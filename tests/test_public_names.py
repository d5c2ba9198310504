"""The names that ``cogview`` exports."""

import subprocess
import sys

import pytest

import cogview


def test_all_names_every_public_object():
    """Each name of ``__all__`` is an object of that name, and ``dir`` lists it."""
    for name in cogview.__all__:
        assert getattr(cogview, name).__name__ == name
    assert set(cogview.__all__) == set(cogview._MODULES)
    assert set(cogview.__all__) < set(dir(cogview))


def test_unknown_name_raises_attribute_error():
    """A misspelt name is reported as Python reports one."""
    with pytest.raises(AttributeError, match="module 'cogview' has no attribute 'CogVlew'"):
        _ = cogview.CogVlew


def test_import_leaves_torch_alone():
    """The package, and the names that need no tensors, are imported in a moment."""
    code = "import sys, cogview; cogview.InputError; cogview.Task; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
