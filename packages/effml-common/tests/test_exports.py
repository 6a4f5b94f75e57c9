"""Public names that are imported when they are used, not before."""

import sys
import types

import pytest

from effml_common.exports import lazy_exports


@pytest.fixture
def package(monkeypatch, tmp_path) -> types.ModuleType:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").write_text(
        "from effml_common.exports import lazy_exports\n"
        "lazy_exports(__name__, {'answer': 'deep', 'Ask': 'deep'})\n"
    )
    (tmp_path / "toy" / "deep.py").write_text("answer = 42\nclass Ask: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("toy", "toy.deep"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__("toy")


def test_a_name_is_imported_at_its_first_use(package) -> None:
    assert "toy.deep" not in sys.modules
    assert package.answer == 42
    assert "toy.deep" in sys.modules
    assert vars(package)["answer"] == 42  # the second use asks nobody


def test_a_star_import_and_dir_see_the_names(package) -> None:
    assert package.__all__ == ["answer", "Ask"]
    assert dir(package) == ["Ask", "answer"]
    namespace: dict = {}
    exec("from toy import *", namespace)
    assert namespace["answer"] == 42


def test_an_unknown_name_is_an_attribute_error(package) -> None:
    with pytest.raises(AttributeError, match="module 'toy' has no attribute 'gone'"):
        package.gone  # noqa: B018
    with pytest.raises(ImportError):
        from toy import gone  # noqa: F401


def test_a_home_that_does_not_import_says_so(package) -> None:
    lazy_exports("toy", {"lost": "nowhere"})
    with pytest.raises(ModuleNotFoundError, match=r"toy\.nowhere"):
        package.lost  # noqa: B018
