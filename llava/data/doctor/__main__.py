"""Check training data: row errors, warnings and statistics.

`python -m llava.data.doctor --data_path data.json --image_folder images` prints it; training does the same at its
start.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llava.constants import DEFAULT_TEMPLATE
from llava.conversation import conv_templates, get_template
from llava.data.data_files import (
    DataFile,
    extract_images,
    find_unused_flags,
    has_tables,
    join_rows,
    list_files,
    read_files,
    split_paths,
)
from llava.data.records import encode_records
from llava.data.row_errors import SHOWN_PER_CODE
from llava.data.table.options import add_table_flags, given_table_flags, table_options
from llava.files.atomic_files import atomic_write
from llava.files.garbage_collector import collector_off
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import log_to_terminal, print_text, report_error

if TYPE_CHECKING:  # for annotations: they import Pillow and transformers
    from llava.data.doctor.checks import Examination
    from llava.tokenization.llama_tokenizer import LlavaTokenizer

CLEAN, HAS_ERRORS, NOTHING_USABLE = 0, 1, 2


class EncodingSettings(NamedTuple):
    """Tokenizer, template and image sizes of a model: what the length of an encoded record depends on."""

    tokenizer: LlavaTokenizer
    template: str
    patches_per_image: int
    use_im_start_end: bool


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python -m llava.data.doctor",
        "Check training data before a GPU is held.",
        """examples:
  python -m llava.data.doctor --data_path playground/data_train/data.json \\
      --image_folder playground/data_train/images --model_name_or_path liuhaotian/llava-v1.5-7b
  python -m llava.data.doctor --data_path one.json two.jsonl --image_folder images --json report.json
  python -m llava.data.doctor --data_path mine.xlsx --question_column text --image_folder images
exit code: 0 clean, 1 something was found, 2 nothing can be trained on, or wrong usage""",
    )
    add = parser.add_argument
    add("--data_path", nargs="+", required=True, metavar="FILE",
        help="LLaVA records (JSON lists, jsonl) and tables (.csv, .xlsx, .parquet), several with spaces or commas "
        "between them")  # fmt: skip
    add("--image_folder", metavar="DIR", help="folder of the images")
    add("--model_name_or_path", metavar="DIR",
        help="model that will be trained, directory or hub id; its tokenizer counts tokens")  # fmt: skip
    add("--vision_tower", metavar="DIR", help="vision tower, for a model that comes without one")
    add("--version", choices=sorted(conv_templates), metavar="NAME",
        help="prompt template (default: the model's, else vicuna_v1)")  # fmt: skip
    add("--model_max_length", type=_positive, default=2048, help="longest row in tokens (default: %(default)s)")
    add("--skip_decoding", action="store_true", help="look whether images are there, but don't decode them")
    add("--workers", type=_positive, help="processes that decode images (default: one for each core)")
    add("--shown", type=_positive, default=SHOWN_PER_CODE, help="rows listed of each kind (default: %(default)s)")
    add("--json", metavar="FILE", help="write the whole report there too, every row included")
    add_table_flags(parser)
    return parser


@collector_off()
def main(argv: Sequence[str] | None = None) -> int:
    """Print the report that the command line asks for; return the exit code."""
    log_to_terminal()
    parser = build_parser()
    options = expand_homes(parser.parse_args(argv), "image_folder", "model_name_or_path", "vision_tower", "json")
    paths = [path for text in options.data_path for path in split_paths(text)]
    inputs = {
        "--data_path": [file for path in paths for file in list_files(path)],
        "--model_name_or_path": options.model_name_or_path,
        "--vision_tower": options.vision_tower,
    }
    if options.json and (message := find_overwrite({"--json": output_file(options.json)}, inputs)):
        parser.error(message)
    if message := find_unused_flags(given_table_flags(options), {"--data_path": paths}):
        parser.error(message)

    from llava.data.doctor.report import as_json, describe_examination  # takes a second: flags are parsed first

    try:
        settings = None
        if options.model_name_or_path:
            settings = _read_model(options.model_name_or_path, options.version, options.vision_tower)
        files = read_files(paths, table_options(options))
        for note in extract_images(files, options.image_folder):
            print_text(note)
        examination = _examine(files, options, settings)
        print_text(describe_examination(examination, shown=options.shown))
        if options.json:
            with atomic_write(options.json) as stream:
                json.dump(as_json(examination), stream, indent=2)
                stream.write("\n")
    except (OSError, ValueError) as error:
        report_error(error)
        return NOTHING_USABLE
    return exit_code(examination)


def exit_code(examination: Examination) -> int:
    """Return the exit code: 0 clean, 1 errors or warnings, 2 no row can be trained on."""
    if not examination.statistics["usable_rows"]:
        return NOTHING_USABLE
    return HAS_ERRORS if examination.errors else CLEAN


def _examine(files: Sequence[DataFile], options: argparse.Namespace, settings: EncodingSettings | None) -> Examination:
    from llava.data.doctor.check_cache import cache_places, describe_inputs, store_result
    from llava.data.doctor.checks import check_unencoded, examine, rows_of_encoded
    from llava.data.doctor.images import check_images

    records = join_rows(files)
    template = settings.template if settings else options.version or DEFAULT_TEMPLATE
    if settings is None:
        rows, errors = check_unencoded(files, template, options.image_folder)
    else:
        lengths = {"patches_per_image": settings.patches_per_image, "max_length": options.model_max_length}
        encoded, errors = encode_records(
            records,
            template,
            settings.tokenizer,
            image_folder=options.image_folder,
            use_im_start_end=settings.use_im_start_end,
            **lengths,
        )
        rows = rows_of_encoded(encoded, errors, len(records), settings.patches_per_image)
    images = [path for row in rows for path in row.images]
    checked = None if options.skip_decoding else check_images(images, workers=options.workers, show_progress=True)
    examination = examine(files, rows, errors, template=template, images=checked)
    if settings is not None and checked is not None and checked.is_complete:  # training need not look again
        paths = [file.path for file in files]
        inputs = describe_inputs(
            paths,
            images,
            errors,
            template=template,
            options=table_options(options) if has_tables(files) else None,
            tokenizer=settings.tokenizer,
            use_im_start_end=settings.use_im_start_end,
            **lengths,
        )
        store_result(cache_places(paths[0], "")[:1], inputs, examination)
    return examination


def _read_model(name: str, version: str | None, vision_tower: str | None) -> EncodingSettings:
    # Here, for without a model there is no need to wait until all of this is imported.
    from llava.model.checkpoint.checkpoint import open_checkpoint, open_tokenizer
    from llava.model.checkpoint.hub import resolve_directory
    from llava.model.configuration import features_per_image
    from llava.model.plan import config_of
    from llava.model.vision_tower import VIT_L_14_336

    config = open_checkpoint(name, vision_tower=vision_tower).config if vision_tower else config_of(name)
    template = config.conversation_template
    if version and template and get_template(version) != get_template(template):
        raise ValueError(f"--version {version}: the model was trained with {template}; leave the flag out")
    vision = config.mm_vision_config or VIT_L_14_336
    patches = features_per_image(config, vision)
    tokenizer = open_tokenizer(resolve_directory(name), config)
    return EncodingSettings(tokenizer, template or version or DEFAULT_TEMPLATE, patches, config.mm_use_im_start_end)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
