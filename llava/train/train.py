"""Finetune LLaVA-1.5, or pretrain its projector; the command line of training. The work is `llava.train.recipe`.

Run by the scripts in `scripts/v1_5`: `deepspeed llava/train/train_mem.py --model_name_or_path ... --data_path ...`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from llava.files.terminal_text import log_to_terminal, report_error
from llava.original_names import lazy_names
from llava.train.flags.arguments import is_first_process
from llava.train.flags.command_line import parse_arguments

__getattr__ = lazy_names(__name__)

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    log_to_terminal(logging.INFO if is_first_process() else logging.WARNING)
    try:
        arguments = parse_arguments(argv)
    except (ValueError, OSError, ImportError) as error:
        return _fail(error, code=2)

    from torch import distributed  # takes seconds, like the recipe: only flags that can be used get here

    from llava.train.distributed import is_lost_connection
    from llava.train.fault_tolerance.out_of_memory import OutOfMemory
    from llava.train.fault_tolerance.signals import Stopped
    from llava.train.recipe import run_training

    try:
        run_training(*arguments)
    except Stopped as stop:
        if is_first_process():
            print(stop, file=sys.stderr)
        return stop.code
    except (ValueError, OSError, ImportError) as error:
        logger.debug("", exc_info=True)
        return _fail(error, code=1)
    except OutOfMemory as error:
        report_error(error)
        _end_with_others(code=1)
        return 1
    except RuntimeError as error:
        if is_lost_connection(error):
            report_error(f"process {os.environ.get('RANK', '0')} lost another one, whose message says why")
            _end_with_others(code=1)
        if "ImageError" not in str(error):  # how an image that can't be decoded arrives from a worker process
            raise
        return _fail(str(error).strip().splitlines()[-1], code=1)
    finally:
        if distributed.is_initialized():  # left open, ZeRO-3 aborts at the interpreter's exit
            distributed.destroy_process_group()
    return 0


def train(attn_implementation: str | None = None) -> None:
    """Run `main` on the command line, as the original's `train()` does.

    Raises:
        SystemExit: if the training failed; the error is on stderr.
    """
    if attn_implementation not in (None, "sdpa"):
        logger.warning("attn_implementation %s is not used; training attends through PyTorch", attn_implementation)
    if code := main():
        raise SystemExit(code)


def _end_with_others(*, code: int) -> None:
    """End the process at once if there are others: they wait in a collective operation that it won't join."""
    from torch import distributed

    if distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fail(error: str | Exception, *, code: int) -> int:
    if is_first_process():
        report_error(error)
    return code


if __name__ == "__main__":
    sys.exit(main())
