"""Upload a model to the Hugging Face hub: the complete directory and a model card, in one commit.

The card says what the model was made from and how it was trained, how to load it, and its licence; with --answers and
--annotations its scores too. --gallery shows images: they, their questions and answers become as public as the model.
The token is that of `hf auth login`, or HF_TOKEN.

Example:
    python scripts/push_to_hub.py --path llava_merged_model --repo me/llava-vqa --private --dry-run
    python scripts/push_to_hub.py --path llava_merged_model --repo me/llava-vqa \\
        --answers answers.jsonl --annotations playground/data_infer/Test_Qs.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.data.table.options import TableOptions
from llava.eval.vqa_score import add_annotation_arguments, parse_table_options
from llava.files.home_directory import expand_homes
from llava.files.program_parser import program_parser
from llava.files.terminal_text import format_size, print_text
from llava.inference.command_line import run_program

_DATA_NAME = "the author's own questions"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python scripts/push_to_hub.py", __doc__)
    add = parser.add_argument
    add("--path", required=True, type=Path, metavar="DIR", help="directory of the model, LoRA adapter or projector")
    add("--repo", required=True, metavar="OWNER/NAME", help="repository on the hub; made if it is not there")
    add("--private", action="store_true", help="make a repository that only its owner can see (default: public)")
    add("--dry-run", action="store_true", help="print what would be uploaded, and the card; the hub is not asked")
    add("--replace-card", action="store_true",
        help="a new card in place of a README.md that was changed, here or on the hub")  # fmt: skip
    add("--base-model", metavar="ID",
        help="id on the hub of the weights it was made from, where a local directory is recorded")  # fmt: skip
    add("--license", metavar="NAME",
        help="licence as the hub spells it, such as apache-2.0 (default: the base's, if known)")  # fmt: skip
    add("--answers", "--answers-file", metavar="JSONL", help="answers of batch inference, to be scored in the card")
    add("--data-name", default=_DATA_NAME, help="what the card calls the scored questions (default: %(default)s)")
    add("--gallery", type=int, default=0, metavar="N",
        help="show N images with question and answer in the card: they become public (default: none)")  # fmt: skip
    add("--questions", "--question-file", metavar="FILE", help="question file or table that was answered")
    add("--image-folder", "--images", metavar="DIR", help="directory of the images, for --gallery")
    add_annotation_arguments(parser, required=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Upload as the command line says; return the exit code."""
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "path", "answers", "questions", "image_folder", "annotations")
    _check_flags(parser, args)
    options = parse_table_options(parser, args, {"--annotations": args.annotations, "--questions": args.questions})
    return run_program(lambda: push_model(args, options), refused=1)


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.gallery < 0:
        parser.error(f"--gallery is {args.gallery}; choose 0 or more")
    needs = {
        "--annotations": (args.annotations, {"--answers": args.answers}),
        "--gallery": (args.gallery, {name: getattr(args, name[2:].replace("-", "_")) for name in
                                     ("--answers", "--questions", "--image-folder")}),
    }  # fmt: skip
    for flag, (is_given, others) in needs.items():
        if is_given and (missing := [other for other, value in others.items() if not value]):
            parser.error(f"{flag} needs {' and '.join(missing)}")
    if args.answers and not (args.annotations or args.gallery):
        parser.error("--answers needs --annotations, to be scored, or --gallery, to be shown")
    if (args.questions or args.image_folder) and not args.answers:
        parser.error("--questions and --image-folder need --answers")
    for flag, is_given in (("--kind-key", args.kind_key), ("--unanimous", args.unanimous != "normalize"),
                           ("--data-name", args.data_name != _DATA_NAME)):  # fmt: skip
        if is_given and not args.annotations:
            parser.error(f"{flag} has no effect without --annotations; add --annotations, or leave it out")


def push_model(args: argparse.Namespace, options: TableOptions) -> None:
    """Check the directory, make its card and upload both; with --dry-run print them.

    Raises:
        OSError: if a file is missing.
        ValueError: if the model is not complete, answers and questions don't belong together, or the hub refuses.
    """
    from llava.constants import CARD_FILE
    from llava.hub.model_facts import is_hub_id  # takes seconds, like all that reads weights
    from llava.hub.push import push, refuse_name
    from llava.hub.upload_files import BASE_KEY, find_local_paths, refuse_incomplete, rename_base, select_files

    refuse_name(args.repo)
    if args.base_model and not is_hub_id(args.base_model):
        raise ValueError(f"--base-model {args.base_model}: give an id on the hub, OWNER/NAME")
    refuse_incomplete(args.path)
    selection = select_files(args.path)
    made = make_card(args, options)
    files: dict[str, Path | bytes] = {**selection.files, **made}
    if args.base_model:
        files |= rename_base(selection.files, args.base_model)
    print_files(args, files, selection.left_out)
    paths = find_local_paths(files)
    for line in paths:
        print_text(f"a path of this machine is uploaded too: {line}")
    if any(BASE_KEY in line for line in paths):
        print_text(f"--base-model ID writes the base's id instead of {BASE_KEY}")
    if args.gallery:
        print_text(f"--gallery: {args.gallery} images with their questions and answers are shown to all who see it")
    if args.dry_run:
        card = files[CARD_FILE]
        print_text(f"\n{CARD_FILE}:\n")
        print_text(card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8", errors="replace"))
        return
    address = push(files, args.repo, private=args.private, replaces_card=args.replace_card, report=print_text)
    print_text(f"uploaded: {address}")


def make_card(args: argparse.Namespace, options: TableOptions) -> dict[str, bytes]:
    """Return the card and the images of its gallery by name; nothing where the directory has a card of its own.

    Raises:
        ValueError: if that card would have to be replaced.
    """
    import dataclasses

    from llava.constants import CARD_FILE
    from llava.eval.card_results import choose_examples, read_answered, score
    from llava.hub.card_file import read_card
    from llava.hub.licences import LLAMA2, LLAMA2_LINK, LLAMA2_NOTICE, NOTICE_FILE, Licence, find_licence
    from llava.hub.model_card import build_card, example_file, is_untouched
    from llava.hub.model_facts import read_facts

    own = args.path / CARD_FILE
    if own.is_file() and not args.replace_card and not is_untouched(read_card(own)):
        asked = [f"--{name.replace('_', '-')}" for name in ("answers", "base_model", "license") if getattr(args, name)]
        if asked:
            raise ValueError(
                f"{own} was written or changed by hand and is uploaded as it is, so {asked[0]} has no place in it; "
                "leave that out, or pass --replace-card for a new card"
            )
        print_text(f"{own} was written or changed by hand: uploaded as it is")
        return {}
    facts = read_facts(args.path)
    if args.base_model:
        facts = dataclasses.replace(facts, base=args.base_model, base_revision=None)
        facts = dataclasses.replace(facts, licence=find_licence(args.base_model) or facts.licence)
    if args.license:
        facts = dataclasses.replace(facts, licence=Licence(args.license, "whoever made these weights"))
    scores, examples = None, []
    if args.answers:
        answered = read_answered(
            args.answers, questions=args.questions, annotations=args.annotations, options=options,
            kind_key=args.kind_key, images=args.image_folder,
        )  # fmt: skip
        scores = score(answered, args.data_name, args.unanimous) if args.annotations else None
        examples = choose_examples(answered, args.image_folder, args.gallery) if args.gallery else []
    notice: dict[str, bytes] = {}
    card = build_card(facts, args.repo, scores=scores, examples=examples).content.encode()
    if facts.licence and facts.licence.identifier == LLAMA2:
        if not any(args.path.glob("N[oO][tT][iI][cC][eE]*")):
            notice = {NOTICE_FILE: f"{LLAMA2_NOTICE}\n".encode()}
        if not any(args.path.glob("LICENSE*")):
            print_text(f"the licence asks for a copy of itself: put it into {args.path} as LICENSE ({LLAMA2_LINK})")
    return {CARD_FILE: card, **notice, **{example_file(number): each.image for number, each in enumerate(examples, 1)}}


def print_files(args: argparse.Namespace, files: Mapping[str, Path | bytes], left_out: Mapping[str, str]) -> None:
    """Print what is uploaded, with sizes, and what is left out."""
    sizes = {name: len(each) if isinstance(each, bytes) else each.stat().st_size for name, each in files.items()}
    print_text(f"{len(files)} files of {args.path}, {format_size(sum(sizes.values()))}:")
    for name, size in sorted(sizes.items()):
        print_text(f"  {name} ({format_size(size)})")
    if left_out:
        names = [f"{name} ({reason})" if reason else name for name, reason in left_out.items()]
        print_text(f"left out: {', '.join(names)}")
