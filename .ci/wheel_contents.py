"""Fails if a wheel would install anything outside ``moe_offload/`` or lacks one of its packages."""

import sys
import tomllib
import zipfile
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "pyproject.toml"
PAGE = "moe_offload/offload/profiling/page"
DATA = ["moe_offload/py.typed", f"{PAGE}/page.html", f"{PAGE}/style.css", f"{PAGE}/script.js"]


def main(path: str) -> None:
    packages = tomllib.loads(CONFIG.read_text())["tool"]["setuptools"]["packages"]
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
    outside = [n for n in names if not n.startswith("moe_offload/") and ".dist-info/" not in n]
    needed = [f"{package.replace('.', '/')}/__init__.py" for package in packages] + DATA
    missing = [name for name in needed if name not in names]
    if outside or missing:
        sys.exit(f"{path}: outside moe_offload/: {outside}; missing: {missing}")
    print(f"{path}: {len(names)} files, all inside moe_offload/")


if __name__ == "__main__":
    main(sys.argv[1])
