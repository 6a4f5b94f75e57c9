"""Places of the samples of shards, kept between runs: scanning millions of headers takes minutes."""

import contextlib
import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from com_pt.training.data.decoding import decoding
from com_pt.training.data.packed import PackedTexts
from com_pt.training.data.shards import ShardIndex, scan_shard
from effml_common.files import atomic_write
from effml_common.folders import cache_folder

FORMAT = 2  # of the kept files; other numbers are scanned again


def load_or_scan(path: Path) -> ShardIndex:
    """Return where the samples of a shard are: as kept, if the file is the same, or from its headers.

    Raises:
        InputError: If the file is not there, or is no complete tar.
    """
    # A shard is the same if its place, size and time of change are.
    with decoding(str(path), "check the path"):
        status = path.stat()
    identity = f"{FORMAT} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    kept = cache_folder("com-pt") / "shards" / f"{name}.safetensors"

    # A kept file that is damaged is written anew.
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        tensors = load(kept.read_bytes())
        keys = PackedTexts(tensors["content"], tensors["text_ends"], tensors["list_ends"])
        return ShardIndex(path, keys, tensors["places"])
    index = scan_shard(path)
    keys = index.keys
    with contextlib.suppress(OSError):  # a home that is full or read-only is no reason to stop
        kept.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "content": keys.content,
            "text_ends": keys.text_ends,
            "list_ends": keys.list_ends,
            "places": index.places,
        }
        atomic_write(kept, save(tensors))
    return index
