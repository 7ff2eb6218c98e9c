"""The flags of `transformers.TrainingArguments`, read from its source file: importing it imports torch, for seconds.

`--help` and wrong flags are answered from what is read here; transformers itself parses the flags of a run. A source
that is written otherwise than expected is not guessed at: `NotReadable` is raised, and transformers answers everything.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import importlib
import importlib.util
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

_ARGUMENTS_FILE, _CLASS = "training_args.py", "TrainingArguments"
_PARSER_FILE, _PARSER = "hf_argparser.py", "HfArgumentParser"


class NotReadable(Exception):
    """A source file of transformers is absent, or has a form that is not known here."""


def read_parser() -> type[ArgumentParser]:
    """Return `HfArgumentParser`, imported from its file alone.

    Raises:
        NotReadable: if the file is absent or needs other modules of transformers.
    """
    path = _package() / _PARSER_FILE
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, _PARSER)
    except (ImportError, OSError, AttributeError) as error:
        raise NotReadable(f"{path}: {error}") from error


def read_fields() -> type:
    """Return a dataclass with the fields of `TrainingArguments`: names, types, defaults and metadata.

    Types of other packages (accelerate's `ParallelismConfig`) are subclasses of `str`: they hold the text.

    Raises:
        NotReadable: if the file is absent or has another form.
    """
    source = _open(_package() / _ARGUMENTS_FILE)
    definition = source.definition(_CLASS)
    if not isinstance(definition, ast.ClassDef) or definition.bases:
        raise NotReadable(f"{source.path}: {_CLASS} has fields of other classes")
    fields, constants = [], {}
    for statement in _statements(definition.body):
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=ast.Call() as field):
                fields.append((name, source.evaluate(kind), source.evaluate(field, constants)))
            case ast.AnnAssign():
                raise NotReadable(f"{source.path}:{statement.lineno}: a field of another form")
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                constants[name] = value
    return dataclasses.make_dataclass(_CLASS, fields)


def _package() -> Path:
    spec = importlib.util.find_spec("transformers")  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise NotReadable("transformers is not installed")
    return Path(spec.origin).parent


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, those under `if` too: the conditions hold with the supported versions of torch and others."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _statements(statement.body)


class _SourceFile:
    """Definitions in a source file, evaluated when they are asked for; no module of the package is imported.

    Known are constants and expressions, enumerations, functions that return an expression, and imports from the
    standard library, from other files of the package, and of types from other packages.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.statements = list(_statements(ast.parse(path.read_text(encoding="utf-8")).body))
        except (OSError, ValueError, SyntaxError) as error:
            raise NotReadable(f"{path}: {error}") from error

    def definition(self, name: str) -> ast.stmt:
        """Return the first statement that defines a name."""
        found = next((statement for statement in self.statements if name in _defined_names(statement)), None)
        if found is None:
            raise NotReadable(f"{self.path}: {name} is not defined")
        return found

    def evaluate(self, expression: ast.expr, constants: Mapping[str, Any] | None = None) -> Any:
        """Return the value of an expression.

        Args:
            expression: of this file.
            constants: further names with their values.
        """
        values = dict(constants or {})
        names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
        values |= {name: self.value(name) for name in names - values.keys() - vars(builtins).keys()}
        try:
            return eval(compile(ast.Expression(expression), str(self.path), "eval"), values)
        except Exception as error:  # an expression of another package may raise anything
            raise NotReadable(f"{self.path}:{expression.lineno}: {error!r}") from error

    def value(self, name: str) -> Any:
        """Return the value of a name."""
        match definition := self.definition(name):
            case ast.Assign(value=value):
                return self.evaluate(value)
            case ast.ClassDef(body=body) if _is_enumeration(definition):
                members = [entry for entry in body if isinstance(entry, ast.Assign)]
                return Enum(name, [(entry.targets[0].id, self.evaluate(entry.value)) for entry in members])
            case ast.FunctionDef(body=[ast.Return(value=value)]):
                return lambda: self.evaluate(value)
            case ast.Import() if name in sys.stdlib_module_names:
                return importlib.import_module(name)
            case ast.ImportFrom():
                return self._imported(definition, name)
        raise NotReadable(f"{self.path}:{definition.lineno}: {name} has another form")

    def _imported(self, statement: ast.ImportFrom, name: str) -> Any:
        original = next(alias.name for alias in statement.names if name in (alias.asname, alias.name))
        if not statement.level:
            if statement.module.partition(".")[0] in sys.stdlib_module_names:
                return getattr(importlib.import_module(statement.module), original)
            return type(original, (str,), {})
        place = self.path.parents[statement.level - 1].joinpath(*(statement.module or "").split("."))
        inner = place / f"{original}.py"
        if inner.is_file():
            return _Attributes(_open(inner))
        return _open(place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).value(original)


class _Attributes:
    """A module whose attributes are the definitions in its source file."""

    def __init__(self, source: _SourceFile) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return self._source.value(name)


@functools.cache
def _open(path: Path) -> _SourceFile:
    return _SourceFile(path)


def _defined_names(statement: ast.stmt) -> set[str]:
    match statement:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {alias.asname or alias.name for alias in names}
    return set()


def _is_enumeration(definition: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in definition.bases)
