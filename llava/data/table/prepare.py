"""Convert a table of questions about images to LLaVA's training records or inference questions; see `--help`."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from llava.data.table.bad_rows import TableError
from llava.data.table.options import add_table_flags, table_options
from llava.data.table.read import Table, TableRow, read_table, write_images
from llava.data.table.write import (
    QUESTION_FIELDS,
    RECORD_FIELDS,
    check_images,
    format_questions_jsonl,
    format_training_json,
    split_by_image,
)
from llava.files.atomic_files import atomic_write
from llava.files.garbage_collector import collector_off
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text, report_error

_DEFAULT_PATHS = {
    "train": ("playground/data_train/Train_Qs.csv", "playground/data_train/data.json"),
    "infer": ("playground/data_infer/Test_Qs.csv", "playground/data_infer/questions.jsonl"),
}
_EXAMPLE = """examples:
  python task_data_preprocessing.py
      the default paths: {train[0]} -> {train[1]}
  python task_data_preprocessing.py --input my.csv --output my.json --image_name "{{id}}.jpg" --val_share 0.05
      your own table and image names; 5 % of the images, with all their questions, go to my_val.json
  python task_data_preprocessing.py --input survey.csv --encoding cp1251 --output data.json \\
      --image_column photo --question_column text --answer_column reply
      Excel's CSV in Russian, columns divided by semicolons, with file names of images and without ids
  python task_data_preprocessing.py --input questions.xlsx --sheet Train --output data.json
      a sheet of a spreadsheet
  python task_data_preprocessing.py --input vqa.parquet --output vqa/data.json --image_folder vqa/images
      a table that holds its images (Hugging Face): they are written into the folder once
  python task_data_preprocessing.py --mode infer --input new.csv --output questions.jsonl --keep kind
      questions without answers for inference; the column `kind` is kept

The table is a .csv or .tsv file in UTF-8 (columns divided by commas, semicolons or tabs), a spreadsheet (.xlsx, .xls,
.ods), a .parquet or .arrow file, or a directory that `datasets` saved to disk. What is found out about it is printed;
docs/tables.md describes it all. A table with bad rows is refused, and nothing is written.
""".format(**_DEFAULT_PATHS)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python task_data_preprocessing.py",
        "Convert a table of questions about images to training records or inference questions.",
        _EXAMPLE,
    )
    train, infer = _DEFAULT_PATHS["train"], _DEFAULT_PATHS["infer"]
    add = parser.add_argument
    add(
        "--mode",
        choices=("train", "infer"),
        default="train",
        help="train: questions with answers; infer: questions alone (default: train)",
    )
    add("--input", metavar="TABLE", help=f"table to read (default: {train[0]}; with --mode infer: {infer[0]})")
    add("--output", metavar="FILE", help=f"file to write (default: {train[1]}; with --mode infer: {infer[1]})")
    add(
        "--keep",
        metavar="COLUMN",
        nargs="+",
        default=[],
        help="columns to copy as extra keys, as text (default: none)",
    )
    add(
        "--val_share",
        metavar="SHARE",
        type=_share,
        help="share of the images (0 to 1) whose questions go to --val_output instead (default: no split)",
    )
    add("--val_output", metavar="FILE", help="file for the validation share (default: --output with _val in its name)")
    add("--seed", type=int, help="decides which images --val_share takes (default: 0)")
    add("--check_images", metavar="DIR", help="folder in which every image must be a file (default: not checked)")
    add(
        "--image_folder",
        metavar="DIR",
        help="folder into which images that the table holds are written (default: images beside --output)",
    )
    add_table_flags(parser)
    return parser


@collector_off()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0 written, 1 the table or a file is unusable (argparse itself exits with 2 for wrong usage).
    """
    args = _parse(argv)
    try:
        table = read_table(args.input, table_options(args, keep=args.keep, has_answers=args.mode == "train"))
        for note in table.notes:
            print_text(f"{args.input}: {note}")
        outputs = _divide(_checked_rows(table, args), args)
        places = folder = args.image_folder or str(Path(args.output).with_name("images"))
        for note in write_images(table, folder):
            print_text(note)
        places = " and ".join(path for path, _ in outputs)
        _write(outputs, args)
    except TableError as error:
        report_error(f"{error}\nNothing was written.")
        return 1
    except OSError as error:
        report_error(
            f"cannot write {places}: {error.strerror or error}. Existing files are unchanged; "
            "free disk space, or choose another path with --output."
        )
        return 1
    for path, written in outputs:
        print_text(f"wrote {path}: {_describe(written)}")
    return 0


def _checked_rows(table: Table, args: argparse.Namespace) -> list[TableRow]:
    """Return the rows of a table after the checks that depend on the program's own flags.

    Raises:
        TableError: if a flag has no effect, or keys or images collide or are missing.
    """
    if args.image_folder is not None and table.images is None:
        raise TableError(f"{args.input} names files and holds no images: --image_folder has no effect; leave it out")
    if "answers" in args.keep and any(len(row.answers) > 1 for row in table.rows):
        raise TableError(f"{args.input}: --keep answers: records with several answers have that key already")
    if args.check_images is not None:
        held = () if table.images is None else table.images.digests
        check_images([row for row in table.rows if row.image not in held], args.check_images, args.input)
    return table.rows


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, fill in defaults that depend on other flags, and refuse flags that contradict."""
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "input", "output", "val_output", "check_images", "image_folder")
    default_input, default_output = _DEFAULT_PATHS[args.mode]
    args.input, args.output = args.input or default_input, args.output or default_output
    if args.mode == "infer":
        given = ("answer_column", "val_share", "val_output", "seed")
        if flags := [f"--{name}" for name in given if getattr(args, name) is not None]:
            parser.error(f"{', '.join(flags)} has no effect with --mode infer; leave it out")
    if args.val_share is None and (args.val_output is not None or args.seed is not None):
        parser.error("--val_output and --seed need --val_share; add it or leave them out")
    if args.val_share is not None and args.val_output is None:
        output = Path(args.output)
        args.val_output = str(output.with_name(f"{output.name.removesuffix(output.suffix)}_val{output.suffix}"))
    args.seed = args.seed or 0
    outputs = {"--output": args.output, "--val_output": args.val_output}
    written = {flag: output_file(path) for flag, path in outputs.items() if path is not None}
    if message := find_overwrite(written, {"--input": args.input}):
        parser.error(message)
    reserved = QUESTION_FIELDS if args.mode == "infer" else RECORD_FIELDS
    if bad := [name for name in args.keep if name in reserved or args.keep.count(name) > 1]:
        parser.error(f"--keep {bad[0]}: every record has that key already; rename the column or leave it out")
    return args


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1, for example 0.05")
    return share


def _divide(rows: list[TableRow], args: argparse.Namespace) -> list[tuple[str, list[TableRow]]]:
    """Return pairs of a file to write and its rows."""
    if args.val_share is None:
        return [(args.output, rows)]
    train, val = split_by_image(rows, args.val_share, args.seed)
    return [(args.output, train), (args.val_output, val)]


def _write(outputs: Sequence[tuple[str, list[TableRow]]], args: argparse.Namespace) -> None:
    """Write all files or, when one of them fails, none."""
    format_rows = format_questions_jsonl if args.mode == "infer" else format_training_json
    with ExitStack() as stack:
        for path, rows in outputs:
            stream = stack.enter_context(atomic_write(path))
            stream.writelines(format_rows(rows, args.keep))
            stream.flush()
            os.fsync(stream.fileno())  # all content is on disk before the first file takes its place


def _describe(rows: Sequence[TableRow]) -> str:
    per_image = Counter([row.image_id for row in rows])
    mean, most = len(rows) / len(per_image), max(per_image.values())
    return f"{len(rows):,} rows, {len(per_image):,} images, {mean:.2f} questions per image (at most {most})"
