"""Hidden states in memory-mapped files, and disks that have no room for them."""

import errno
import os
import resource
from collections.abc import Iterator

import pytest
import torch

from sliderquant.adapters.caches import ActivationCache

pytestmark = pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="the system cannot reserve blocks"
)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of this process have a limit, which they find as they would find a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_has_all_its_blocks_before_it_is_mapped(tmp_path, monkeypatch) -> None:
    sizes = []
    from_file = torch.from_file

    def look_and_map(path: str, **words) -> torch.Tensor:
        sizes.append(os.stat(path).st_blocks * 512)
        return from_file(path, **words)

    monkeypatch.setattr(torch, "from_file", look_and_map)
    hidden = torch.arange(30_000.0).view(3, 100, 100)
    with ActivationCache(tmp_path / "cache") as cache:
        for shift in (0, 1):
            assert torch.equal(cache("x", hidden + shift), hidden + shift)
    assert min(sizes) >= hidden.nbytes


def test_no_room_for_a_file_is_an_error_that_names_it(tmp_path, small_files) -> None:
    with ActivationCache(tmp_path / "cache") as cache:
        with pytest.raises(OSError, match="File too large") as caught:
            cache("x", torch.zeros(30_000))
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(tmp_path / "cache" / "rank-0" / "x")
    assert not (tmp_path / "cache").exists()
