"""Check the registry of vLLM's symbols against sources of vLLM that are not installed.

    python -m tools.check_vllm_sources FOLDER...

Each FOLDER holds the package `vllm`, for example an unpacked wheel. Nothing of it is imported.
Prints one line for each symbol that is missing, and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from vllm_r3_plugin import seams
from vllm_r3_plugin.seam_check import release_of

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign


class Sources:
    """The modules below ``folder``, parsed when they are looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = release_of(next(folder.glob("vllm*.dist-info")).name.split("-")[1])
        self.module = cache(self._parse)

    def problem(self, seam: seams.Seam) -> str | None:
        """What ``seam`` needs and these sources lack, or None."""
        module, _, path = seam.symbol.partition(":")
        first, *rest = path.split(".")
        found = self.find(module, first)
        for name in rest:
            found = found and self.member(*found, name)
        if found is None:
            return "no such symbol"
        where, definition = found
        absent = [name for name in seam.attributes if self.member(where, definition, name) is None]
        if absent:
            return f"no attribute {', '.join(absent)}"
        if seam.parameters:
            assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef), seam.symbol
            names = tuple(a.arg for a in (*definition.args.posonlyargs, *definition.args.args))
            if names[: len(seam.parameters)] != seam.parameters:
                return f"takes ({', '.join(names)}), expected ({', '.join(seam.parameters)})"
        return None

    def find(self, module: str, name: str) -> tuple[str, Definition] | None:
        """The definition of a module's ``name``, through imports, and the module it stands in."""
        for node in self.module(module):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name and node.module is not None:
                        return self.find(self._absolute(module, node), alias.name)
            elif name in _names(node):
                assert isinstance(node, Definition)
                return module, node
        return None

    def member(self, module: str, cls: Definition, name: str) -> tuple[str, Definition] | None:
        """What a class or its bases define, declare or, where they begin, assign as ``name``."""
        if not isinstance(cls, ast.ClassDef):
            return None
        for node in _flat(cls.body):
            if name in _names(node):
                assert isinstance(node, Definition)
                return module, node
            if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__post_init__"):
                for inner in ast.walk(node):
                    if name in _assigned_to_self(inner):
                        assert isinstance(inner, Definition)
                        return module, inner
        for base in cls.bases:
            root = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(root, ast.Name) and (found := self.find(module, root.id)):
                inherited = self.member(*found, name)
                if inherited is not None:
                    return inherited
        return None

    def _parse(self, module: str) -> list[ast.stmt]:
        path = self.folder.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return list(_flat(ast.parse(file.read_text()).body))
        return []

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = (self.folder.joinpath(*module.split(".")) / "__init__.py").exists()
        parts = module.split(".")[: None if is_package and node.level == 1 else -node.level]
        return ".".join([*parts, node.module or ""])


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _flat([*node.body, *node.orelse])


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _assigned_to_self(node: ast.AST) -> list[str]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        for target in node.targets:
            targets += target.elts if isinstance(target, ast.Tuple) else [target]
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [t.attr for t in targets if isinstance(t, ast.Attribute)]


def main(folders: list[str]) -> int:
    """Check every folder; 1 if a symbol is missing in one."""
    failed = False
    for folder in folders:
        sources = Sources(Path(folder))
        version = ".".join(map(str, sources.version))
        entries = [seam for seam in seams.SEAMS if seam.applies_to(sources.version)]
        problems = [(seam, sources.problem(seam)) for seam in entries]
        missing = [(seam, problem) for seam, problem in problems if problem]
        print(
            f"vLLM {version}: {len(entries) - len(missing)} of {len(entries)} symbols as expected"
        )
        for seam, problem in missing:
            print(f"  {seam.symbol}: {problem}; it serves: {seam.why}")
        failed |= bool(missing)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
