"""The notebook runs on the embedded model, and is stored without outputs in the form that gives small diffs."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FINETUNE = ROOT / "notebooks/finetune.ipynb"
PROGRAMS = ("llava", "scripts", "examples", "task_data_preprocessing.py", "inference.sh", "playground/llava-tiny")
SMALL = "TRAIN_SCENES, TEST_SCENES = 48, 10"


def sources(path: Path) -> dict[str, str]:
    """The code of a notebook by the ids of its cells."""
    cells = nbformat.read(path, as_version=4).cells
    return {cell.id: cell.source for cell in cells if cell.cell_type == "code"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository as far as the notebook needs it, which it may write into."""
    folder = tmp_path / "checkout"
    for name in PROGRAMS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "notebooks").mkdir()
    return folder


@pytest.fixture
def execute(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """The function that runs a notebook in the copy of the repository; a cell that fails raises with its traceback."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    with tempfile.TemporaryDirectory(prefix="k") as sockets:  # their paths may have about 100 characters
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", sockets)

        def run(notebook: Any) -> None:
            client = NotebookClient(
                notebook,
                timeout=600,  # s, against a hang
                startup_timeout=600,
                kernel_name="python3",
                resources={"metadata": {"path": str(checkout / "notebooks")}},
                # Sockets of this test's own: another process could take a port between its choice and its use.
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
            )
            client.execute()

        yield run


@pytest.mark.slow
def test_the_notebook_runs(execute: Callable[[Any], None], checkout: Path) -> None:
    notebook = nbformat.read(FINETUNE, as_version=4)
    place = 1 + next(number for number, cell in enumerate(notebook.cells) if cell.id == "parameters")
    notebook.cells.insert(place, nbformat.v4.new_code_cell(SMALL, id="small"))
    execute(notebook)

    outputs = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
    assert [name for name in ("images", "loss", "ask") if not shows(outputs[name], "image/png")] == []
    assert "srcdoc" in shows(outputs["report"], "text/html")[-1]
    assert "LoadedModel('llava_merged_model_tiny'" in shows(outputs["load"], "text/plain")[0]
    assert "needed on each GPU" in printed(outputs["plan"])
    assert re.search(r"base.*finetuned", printed(outputs["score"]), re.DOTALL)
    assert len(re.findall(r"\(\d+%; else: .*\)$", printed(outputs["ask"]), re.MULTILINE)) == 4
    assert printed(outputs["chat"]).strip()
    lines = (checkout / "playground/data_infer/llava-tiny-finetuned.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line).get("error") for line in lines] == [None] * len(lines)


def shows(outputs: list, kind: str) -> list[str]:
    """What a cell shows of a kind."""
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def printed(outputs: list) -> str:
    """What a cell prints."""
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_stored_tidily(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    nbformat.validate(content)
    assert text == json.dumps(content, indent=1, ensure_ascii=False) + "\n"  # as Jupyter writes it
    for cell in content["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert all("\n" not in line[:-1] for line in cell["source"])
        assert re.fullmatch("[a-z0-9-]+", cell["id"])
        assert set(cell["metadata"]) <= {"tags"}
        links = re.findall(r"\]\((\.\./[^)\s]+)\)", "".join(cell["source"]))
        assert [link for link in links if not (path.parent / link).exists()] == []


def test_a_failed_command_stops_the_notebook(execute: Callable[[Any], None]) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in (sources(FINETUNE)["repository"], "!exit 3\ncheck()")]
    with pytest.raises(CellExecutionError, match="the command above ended with exit code 3"):
        execute(nbformat.v4.new_notebook(cells=cells))


def test_every_command_is_checked() -> None:
    for name, source in sources(FINETUNE).items():
        lines = re.sub(r"\\\n\s*", "", source).splitlines()
        for number, line in enumerate(lines):
            if line.lstrip().startswith("!"):
                assert lines[number + 1].strip() == "check()", name


def test_flags_of_the_small_model_are_those_of_the_quickstart() -> None:
    quickstart = (ROOT / "scripts/quickstart.sh").read_text("utf-8").replace("\\\n", " ")
    flags = re.search(r"finetune_task_lora\.sh\s+(--.*)", quickstart)[1].split()
    found = re.search(r"FLAGS = \((.*?)\n    \)", sources(FINETUNE)["choices"], re.DOTALL)[1]
    shown = "".join(re.findall(r'"(.*?)"', found)).split()
    assert (shown[:-1], shown[-2]) == (flags[:-1], "--logging_steps")  # its number alone differs
