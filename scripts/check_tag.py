"""Which package a release tag names, and whether its version is the one in the tree.

python scripts/check_tag.py sliderquant-v0.1.0     prints sliderquant, or says what is wrong
"""

import sys

from workspace import members


def package_of(tag: str) -> str:
    name, found, version = tag.rpartition("-v")
    known = {member.name: member.version for member in members()}
    if not found or name not in known:
        raise SystemExit(
            f"error: no package for tag {tag!r}; use one of {', '.join(known)} + -vX.Y.Z"
        )
    if version != known[name]:
        raise SystemExit(f"error: tag says {version}, {name} says {known[name]}; make them agree")
    return name


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("error: one tag, please; for example sliderquant-v0.1.0")
    print(package_of(sys.argv[1]))
