"""Imports point one way: every module belongs to a layer, and a layer imports only those below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "llava"

MAY_IMPORT = {  # layer -> layers of llava it may import
    "constants": (),
    "conversation": (),
    "tokenizer_json": ("files",),
    "tokenization": ("constants", "files", "tokenizer_json"),
    "chat_template": ("constants", "conversation"),
    "files": (),  # complete-or-absent writes and small JSON files, for whoever writes and reads
    "image_processing": (
        "files",
    ),  # pixels without a model: mm_utils and data need them, the tower carries its processor
    "mm_utils": ("constants", "image_processing"),
    "model": ("constants", "tokenization", "files", "image_processing"),
    "data": ("constants", "conversation", "tokenization", "mm_utils", "files", "image_processing"),  # without a model
    "inference": (
        "constants",
        "conversation",
        "tokenization",
        "mm_utils",
        "model",
        "data",
        "files",
        "image_processing",
    ),
    "train": (
        "constants",
        "conversation",
        "tokenization",
        "mm_utils",
        "model",
        "data",
        "inference",
        "files",
        "image_processing",
    ),
    "eval": ("constants", "conversation", "mm_utils", "data", "inference", "model", "files", "image_processing"),
    "serve": ("constants", "conversation", "mm_utils", "inference", "model", "files", "image_processing"),
}

ALSO_MAY_IMPORT = {  # modules that reach further than their layer
    "data/doctor.py": ("model",),  # a program: reads the template and the sizes in the config of what will be trained
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """`llava/model/splice.py` -> `model`, `llava/files.py` -> `files`."""
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_imports_only_layers_below_it(path):
    names, banned = read_imports(path.read_text(encoding="utf-8"))
    assert banned == []
    layer = layer_of(path)
    if layer == "__init__":  # the package gives one name lazily, as the original did
        assert names == ["llava.model.llava_llama"]
        return
    assert layer in MAY_IMPORT, f"{path} belongs to no layer"
    imported = {name.split(".")[1] if "." in name else "the package itself" for name in names}
    name = path.relative_to(PACKAGE).as_posix()
    assert imported <= {layer, *MAY_IMPORT[layer], *ALSO_MAY_IMPORT.get(name, ())}


def test_the_table_has_no_cycles_and_no_dead_rows():
    assert {layer_of(path) for path in MODULES} - {"__init__"} == set(MAY_IMPORT)
    assert set(ALSO_MAY_IMPORT) <= {path.relative_to(PACKAGE).as_posix() for path in MODULES}
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        ready = [layer for layer, below in MAY_IMPORT.items() if layer not in order and set(below) <= set(order)]
        assert ready, f"a cycle among {set(MAY_IMPORT) - set(order)}"
        order += ready


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
