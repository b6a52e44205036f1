"""The names that `hf_epimer` gives away."""

from __future__ import annotations

from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType

import hf_epimer


def test_public_names_are_what_they_say_whatever_was_imported_before() -> None:
    """A file called as a public name would stand in its place from its first import on."""
    for module in walk_packages(hf_epimer.__path__, "hf_epimer."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    assert sorted(hf_epimer.__all__) == sorted(hf_epimer._HOMES) == dir(hf_epimer)
    for name, home in hf_epimer._HOMES.items():
        found = getattr(hf_epimer, name)
        assert found is getattr(import_module(f"hf_epimer.{home}"), name)
        assert not isinstance(found, ModuleType)
        assert callable(found) or name.isupper()  # a constant
