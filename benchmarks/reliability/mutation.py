"""Mutants of a file: its source with one small change each, as mutmut's operators make them.

mutmut itself leaves out decorated functions (properties, validators, static methods) and what stands in a class or a
module outside of functions; here all of that is changed too. Left alone is what cannot change behaviour: docstrings and
annotations, but for the fields of strict configurations, whose annotations validate.
"""

import ast
import difflib
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import Mutation, MutationVisitor
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode


@dataclass(frozen=True, eq=False)
class Mutant:
    """One change of a file. `function`: qualified name and first line of the outermost function that it lies inside of,
    None where it shows only when the module is executed anew; `body`: that function's lines."""

    path: Path
    line: int
    operator: str
    function: tuple[str, int] | None
    body: range
    render: Callable[[], str]

    @cached_property
    def source(self) -> str:
        """The whole changed file."""
        return self.render()

    @cached_property
    def diff(self) -> list[str]:
        """The lines that went and came."""
        lines = difflib.unified_diff(self.path.read_text().splitlines(), self.source.splitlines(), n=0)
        return [line[0] + line[1:].strip() for line in lines if line[0] in "+-"][2:]

    @cached_property
    def key(self) -> str:
        """The same for the same change of the same file."""
        return hashlib.sha256(f"{self.path}\n{self.source}".encode()).hexdigest()[:16]


class _Visitor(MutationVisitor):
    """Notes which operator made what, and goes into decorated functions and annotations that validate."""

    def __init__(self) -> None:
        operators = [(kind, self._noting(operator)) for kind, operator in mutation_operators]
        super().__init__(operators, IgnoredCode(set(), set(), set()))
        self.names: list[str] = []
        self._strict: list[bool] = [False]

    def _noting(self, operator):
        def note(node):
            for changed in operator(node):
                self.names.append(operator.__name__.removeprefix("operator_"))
                yield changed

        return note

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.ClassDef):
            self._strict.append(any(getattr(base.value, "value", None) == "Strict" for base in node.bases))
        elif isinstance(node, cst.FunctionDef):
            self._strict.append(False)
        return super().on_visit(node)

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.ClassDef | cst.FunctionDef):
            self._strict.pop()
        super().on_leave(node)

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            return False
        if isinstance(node, cst.Annotation):
            return not self._strict[-1]
        return super()._skip_node_and_children(node)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All mutants of a file, in the order of its lines; some few may be the same change."""
    text = path.read_text()
    wrapper = MetadataWrapper(cst.parse_module(text))
    visitor = _Visitor()
    wrapper.visit(visitor)
    positions = wrapper.resolve(PositionProvider)
    bodies = list(_bodies(ast.parse(text)))
    for change, operator in zip(visitor.mutations, visitor.names, strict=True):
        line = positions[change.original_node].start.line
        function, body = next(((name, body) for name, body in bodies if line in body), (None, range(0)))
        yield Mutant(path, line, operator, function, body, partial(_render, wrapper.module, change))


def _render(module: cst.Module, change: Mutation) -> str:
    code = module.deep_replace(change.original_node, change.mutated_node)
    assert isinstance(code, cst.Module)
    return code.code


def select(paths: Iterable[Path], size: int | None, seed: int) -> list[Mutant]:
    """The mutants of files that differ from the files and from each other; at most `size` of them, drawn at random."""
    every = [mutant for path in paths for mutant in mutants_of(path)]
    order = every if size is None else random.Random(seed).sample(every, len(every))
    found: dict[str, Mutant] = {}
    for mutant in order:
        if len(found) == size:
            break
        if mutant.diff:
            found.setdefault(mutant.key, mutant)
    return list(found.values())


def _bodies(tree: ast.AST, within: str = "") -> Iterator[tuple[tuple[str, int], range]]:
    """Qualified name, first line as code objects tell it, and the body's lines of functions that no other encloses."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _bodies(node, f"{within}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield (within + node.name, first), range(node.body[0].lineno, (node.end_lineno or 0) + 1)
