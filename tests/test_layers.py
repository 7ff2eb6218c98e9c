"""Imports point one way: every module belongs to a layer, and a layer imports only those above it in the table."""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "llava"

LAYERS = (  # a module imports its own layer and those of the rows above
    ("constants", "files", "library_noise", "original_names"),  # original_names: a table of strings
    ("image_files", "model_names", "tokenization"),
    ("clip_image_processor", "conversation"),
    ("chat_template", "image_processing"),
    ("mm_utils",),
    ("data", "model"),
    ("hub",),
    ("inference",),
    ("eval", "export", "serve", "train"),
    ("__main__",),  # the command `llava`: names all programs, imports the one that runs
    ("original",),  # thin entries for callers of the original; nothing imports them but through original_names
)

ALSO_MAY_IMPORT = {  # modules that reach beside their row
    "model/planner/workload.py": "data",  # plans with the packs that training makes
    "model/planner/data_packs.py": "data",  # reads the records that are planned for
    "export/push.py": "eval",  # scores and gallery of the model card
    "data/doctor/__main__.py": "model",  # reads the template and the sizes in the config of what will be trained
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """`llava/model/splice.py` -> `model`, `llava/files/atomic_files.py` -> `files`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def read_imports(source: str) -> tuple[list[str], list[str]]:
    """Absolute names of llava's modules that a source imports, also inside functions; and the banned forms it uses."""
    names, banned = [], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split(".")[0] == "llava"]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                banned.append(f"line {node.lineno}: relative import")
            elif any(alias.name == "*" for alias in node.names):
                banned.append(f"line {node.lineno}: import *")
            elif node.module == "llava":
                banned.append(f"line {node.lineno}: from llava import ...")
            elif node.module.split(".")[0] == "llava":
                names.append(node.module)
    return names, banned


def imports_of_a_module(path: Path) -> list[str]:
    """Names that a module imports outside its functions, `from llava.data import split` as `llava.data.split` too."""
    statements = [
        node
        for outer in ast.parse(path.read_text(encoding="utf-8")).body
        if not isinstance(outer, ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(outer)
    ]
    found = [node for node in statements if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}" for node in found for alias in node.names]
    return [node.module for node in found] + names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_imports_only_the_layers_it_may(path):
    names, banned = read_imports(path.read_text(encoding="utf-8"))
    assert banned == []
    layer = layer_of(path)
    if layer == "__init__":  # hands on the original's names lazily; `load` imports when it is called
        assert set(names) - {"llava.inference.loaded_model", "llava.inference.session"} == {
            "llava.library_noise",
            "llava.original_names",
        }
        return
    rows_above = itertools.takewhile(lambda row: layer not in row, LAYERS)
    allowed = {layer, *itertools.chain(*rows_above), ALSO_MAY_IMPORT.get(path.relative_to(PACKAGE).as_posix())}
    imported = {name.split(".")[1] if "." in name else "the package itself" for name in names}
    assert imported <= allowed


def test_every_layer_has_its_row():
    assert sorted({layer_of(path) for path in MODULES} - {"__init__"}) == sorted(itertools.chain(*LAYERS))
    assert set(ALSO_MAY_IMPORT) <= {path.relative_to(PACKAGE).as_posix() for path in MODULES}


def test_no_module_imports_itself_through_others():
    """While modules are imported, that is: `from_pretrained` reaches up to the builder when it is called."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    left = {name: set(imports_of_a_module(path)) & set(names) for name, path in names.items()}
    while ready := [name for name, imported in left.items() if not imported & set(left)]:
        for name in ready:
            del left[name]
    assert sorted(left) == []


def test_no_folder_holds_more_than_16_modules():
    folders = Counter(path.parent for path in MODULES if path.name != "__init__.py")
    assert {folder.as_posix(): count for folder, count in folders.items() if count > 16} == {}


def test_every_form_of_import_is_seen():
    source = (
        "import llava.data.records\nimport os\nfrom llava.model.splice import f\nfrom llava import x\n"
        "from . import y\nfrom .z import w\nfrom os import *\ndef f():\n    from llava.train.lora import g\n"
        "    import llava\n"
    )
    names, banned = read_imports(source)
    assert sorted(names) == ["llava", "llava.data.records", "llava.model.splice", "llava.train.lora"]
    assert banned == [
        "line 4: from llava import ...",
        "line 5: relative import",
        "line 6: relative import",
        "line 7: import *",
    ]
