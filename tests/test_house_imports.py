"""The house rules that a reader relies on: imports point one way, every folder is installed, every module is named."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
FOLDERS = {"moe_offload": REPO / "src" / "moe_offload"} | {
    name: REPO / name for name in ("cache", "cli", "offload", "quant")
}
MAY_IMPORT = {
    "cli": {"cli", "offload", "cache", "quant"},
    "offload": {"offload", "cache", "quant"},
    "cache": {"cache"},
    "quant": {"quant"},
}
# What `moe-offload --help` may not wait for.
HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "huggingface_hub"}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def module_name(package: str, path: Path) -> str:
    """``offload/model.py`` -> ``moe_offload.offload.model``."""
    parts = path.relative_to(FOLDERS[package]).with_suffix("").parts
    stem = [] if package == "moe_offload" else [package]
    return ".".join(["moe_offload", *stem, *(part for part in parts if part != "__init__")])


def imported(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    """The absolute names of every module imported under ``tree``, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            if node.level:
                base = base[: len(base) - node.level + (1 if is_package else 0)]
                prefix = ".".join([*base, *([node.module] if node.module else [])])
            else:
                prefix = node.module or ""
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def imported_on_load(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[str]:
    """What importing the module imports: not what stands in functions or under ``if TYPE_CHECKING``."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node, module, is_package=is_package)
        waiting.extend(ast.iter_child_nodes(node))


def every_module() -> list[tuple[str, Path]]:
    return [(package, path) for package, folder in FOLDERS.items() for path in sources(folder)]


def imports_of(package: str, path: Path, *, on_load: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(), str(path))
    walk = imported_on_load if on_load else imported
    return set(walk(tree, module_name(package, path), is_package=path.name == "__init__.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str):
    wrong = []
    for path in sources(FOLDERS[package]):
        for name in imports_of(package, path):
            parts = name.split(".")
            if parts[0] == "moe_offload" and len(parts) > 1 and parts[1] in MAY_IMPORT.keys() - MAY_IMPORT[package]:
                wrong.append(f"{path.relative_to(REPO)} imports {name}")
            if parts[0] in MAY_IMPORT:
                wrong.append(f"{path.relative_to(REPO)} imports {name}: write moe_offload.{name}")
    assert not wrong


def test_cache_imports_no_torch():
    wrong = {
        f"{path.relative_to(REPO)} imports {name}"
        for path in sources(FOLDERS["cache"])
        for name in imports_of("cache", path)
        if name.split(".")[0] in HEAVY
    }
    assert not wrong


def test_help_waits_for_nothing_heavy():
    """Follows the imports that loading the command line's modules causes, through every module of ours."""
    by_name = {module_name(package, path): (package, path) for package, path in every_module()}
    waiting = [module_name("cli", path) for path in sources(FOLDERS["cli"])]
    seen: dict[str, str] = dict.fromkeys(waiting, "the command line")
    wrong = []
    while waiting:
        module = waiting.pop()
        for name in imports_of(*by_name[module], on_load=True):
            if name.split(".")[0] in HEAVY:
                wrong.append(f"{module} (imported by {seen[module]}) imports {name}")
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                own = ".".join(parts[:end])
                if own in by_name and own not in seen:
                    seen[own] = module
                    waiting.append(own)
    assert not wrong


def test_every_folder_is_installed():
    configured = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for package, folder in FOLDERS.items():
        stem = "moe_offload" if package == "moe_offload" else f"moe_offload.{package}"
        for path in sources(folder):
            found.add(".".join([stem, *path.parent.relative_to(folder).parts]))
    assert found == set(configured)


def test_architecture_names_every_module():
    text = (REPO / "docs" / "architecture.md").read_text()
    names = [str(path.relative_to(REPO)) for _, path in every_module() if path.name != "__init__.py"]
    missing = [name for name in names if f"`{name}`" not in text and f"`{Path(name).name}`" not in text]
    assert not missing


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch", {"torch"}),
        ("def f():\n    import torch", set()),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import json", {"json"}),
        ("class C:\n    import torch", {"torch"}),
        ("from . import reader", {"moe_offload.offload.reader"}),
        ("from .reader import Read", {"moe_offload.offload.reader.Read"}),
        ("try:\n    from a.b import c\nexcept ImportError:\n    pass", {"a.b.c"}),
    ],
)
def test_the_import_reader_itself(source: str, expected: set[str]):
    found = set(imported_on_load(ast.parse(source), "moe_offload.offload.model", is_package=False))
    assert found == expected
