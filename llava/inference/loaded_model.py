"""`LoadedModel`: a model for Python and notebooks, with `ask`, `ask_many` and `chat`; made by `llava.load`."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar, overload

from PIL import Image
from tqdm.auto import tqdm

from llava.files.home_directory import expand_home
from llava.image_files.decode import decode_image, to_rgb
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.answers_file import Answer
from llava.inference.chat.chat import Chat
from llava.inference.image_cells import ImageLike, read_cell
from llava.inference.load_image import load_image
from llava.inference.question_rows import QuestionRows, read_question_rows
from llava.inference.sampler import Sampling
from llava.inference.session import Session

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _DataFrame(Protocol):
    """What pandas and polars have and other rows lack, for type checkers."""

    @property
    def columns(self) -> Any: ...


_Frame = TypeVar("_Frame", bound=_DataFrame)


class _Options(TypedDict, total=False):
    """Options of `ask_many`, for type checkers: its overloads differ in rows and result alone."""

    question_column: str | None
    image_column: str | None
    image_name: str | None
    question_id_column: str | None
    delimiter: str | None
    encoding: str | None
    sheet: str | None
    temperature: float
    top_p: float | None
    max_new_tokens: int
    seed: int | None
    batch_size: int | None
    progress: bool


@dataclass(frozen=True)
class Reply:
    """Answer to one question; `str()` of it is the text.

    Attributes:
        text: the clean answer.
        probability: of the whole answer, under the model without temperature.
        runner_up: the likeliest other first token, as text.
        runner_up_probability: of that token.
    """

    text: str
    probability: float
    runner_up: str
    runner_up_probability: float

    def __str__(self) -> str:
        return self.text


def latest_reply(chat: Chat) -> Reply:
    """Return the latest answer of a chat with scores.

    Raises:
        ValueError: if it has no answer yet.
    """
    if not chat.turns:
        raise ValueError("this chat has no answer yet; call ask or stream first")
    first = chat.scores[0]
    return Reply(
        chat.turns[-1][1],
        math.exp(sum(score.logprob for score in chat.scores)),
        chat.session.tokenizer.decode([first.runner_up]),
        math.exp(first.runner_up_logprob),
    )


class ImageChat:
    """Conversation about images, whose KV cache is kept from turn to turn.

    Args:
        chat: a new one, with scores.
        images: sent with the first question.

    Example:
        >>> chat = llava.load("llava_merged_model").chat("man.jpg")
        >>> print(chat.ask("What is he holding?"))
        >>> for piece in chat.stream("What color is it?"):
        ...     print(piece, end="", flush=True)
    """

    def __init__(self, chat: Chat, images: Sequence[Image.Image]) -> None:
        self._chat, self._images = chat, list(images)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Question and answer of each turn."""
        return list(self._chat.turns)

    def ask(self, question: str) -> Reply:
        """Ask a question and return the whole answer.

        Raises:
            TypeError: if the question is not a text.
            ValueError: if the question is empty or the context is full.
        """
        for _ in self.stream(question):
            pass
        return self.latest()

    def stream(self, question: str) -> Iterator[str]:
        """Ask a question, and return an iterator over the pieces of the answer; `latest` has its probability.

        Raises:
            TypeError, ValueError: as `ask`.
        """
        if not isinstance(question, str):
            raise TypeError(f"the question is of type {type(question).__name__}, not a text")
        return self._chat.reply(question, [] if self._chat.turns else self._images)

    def latest(self) -> Reply:
        """Return the latest answer.

        Raises:
            ValueError: if nothing was asked yet.
        """
        return latest_reply(self._chat)

    def reset(self) -> None:
        """Start a new conversation about the same images."""
        self._chat.reset()


class LoadedModel:
    """A loaded model that answers questions about images.

    Args:
        session: model, tokenizer, image processor and prompt template.
        name: its path, for `repr`.
    """

    def __init__(self, session: Session, name: str = "unnamed") -> None:
        self.session, self.name = session, name

    def __repr__(self) -> str:
        model = self.session.model
        return f"LoadedModel({self.name!r}, device={str(model.device)!r}, dtype={model.dtype})"

    def ask(
        self,
        image: ImageLike | Sequence[ImageLike] | None,
        question: str,
        *,
        temperature: float = 0.0,
        top_p: float | None = None,
        max_new_tokens: int = 128,
        seed: int | None = None,
    ) -> Reply:
        """Ask one question.

        Args:
            image: a path, an http(s) address, the bytes of an image file, a Pillow image, or a list of these; None =
                a question without image.
            question: text; its `<image>` marks say where the images go, without any they go first.
            temperature: 0 = the likeliest token at each step (greedy); above 0, tokens are drawn.
            top_p: draw among the likeliest tokens that together have this probability; None = among all.
            max_new_tokens: longest answer, in tokens.
            seed: of the draws; None = a random one.

        Raises:
            TypeError: if the question is not a text, or an image of another kind.
            ValueError: if the question, an image or an option can't be used.

        Example:
            >>> model.ask("man.jpg", "What is he holding?").text
        """
        chat = self.chat(image, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
        return chat.ask(question)

    def chat(
        self,
        image: ImageLike | Sequence[ImageLike] | None = None,
        *,
        temperature: float = 0.0,
        top_p: float | None = None,
        max_new_tokens: int = 512,
        seed: int | None = None,
    ) -> ImageChat:
        """Start a conversation about an image; arguments as in `ask`.

        Raises:
            TypeError: if an image is of another kind.
            ValueError: if an image or an option can't be used.
        """
        sampling = Sampling(temperature, top_p, 1, max_new_tokens, seed)
        return ImageChat(Chat(self.session, sampling, with_scores=True), _read_images(image))

    @overload
    def ask_many(
        self, rows: str | os.PathLike[str], image_folder: str | os.PathLike[str] = "", **options: Unpack[_Options]
    ) -> list[dict[str, Any]]: ...

    @overload
    def ask_many(
        self, rows: _Frame, image_folder: str | os.PathLike[str] = "", **options: Unpack[_Options]
    ) -> _Frame: ...

    @overload
    def ask_many(
        self,
        rows: Iterable[Mapping[str, Any]],
        image_folder: str | os.PathLike[str] = "",
        **options: Unpack[_Options],
    ) -> list[dict[str, Any]]: ...

    def ask_many(
        self,
        rows: Any,
        image_folder: str | os.PathLike[str] = "",
        *,
        question_column: str | None = None,
        image_column: str | None = None,
        image_name: str | None = None,
        question_id_column: str | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        sheet: str | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        max_new_tokens: int = 128,
        seed: int | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Any:
        """Ask many questions through the batch engine: each image is encoded once for all its questions.

        All answers are in memory until the last one is there. A run of hours belongs to `llava.eval.model_vqa_loader`,
        which resumes after an interruption.

        Args:
            rows: dictionaries, a pandas or polars DataFrame, or the path of a question file: JSON Lines or a table.
            image_folder: holds the images that the rows name; "" = names are paths.
            question_column: column of the question; None = "question", or "text" where rows lack it.
            image_column: column of the images: names, numbers, bytes of image files, Pillow images, or lists of these;
                None = the first of image_id, image and file_name, before them one that holds images. A row with an
                empty cell is asked without image.
            image_name: file name of an image, `{id}` standing for the cell; None = names as they are, and of numbers
                those of COCO val2014.
            question_id_column: of a table in a file, as are `delimiter`, `encoding` and `sheet`; None = found out.
            temperature: as in `ask`, as are `top_p`, `max_new_tokens` and `seed`.
            batch_size: most questions decoded at once; None = what fits the memory.
            progress: show a progress bar, in a terminal or a notebook.

        Returns:
            The rows in their order with `answer`, `probability` and `error` (a text or None): a DataFrame if one came
            in, else a list of dictionaries; of a file they have `question_id`, `image` and `text`. A row that can't be
            answered (a missing image, say) has an error and an empty answer.

        Raises:
            TypeError: if `rows` is of another kind.
            ValueError: if a row has no question, an image is of another kind, a column is missing or named as one of
                the answers', or an option is wrong.
            NotADirectoryError: if there is no such image folder.

        Example:
            >>> model.ask_many([{"image": "man.jpg", "question": "What is he holding?"}], "photos")
            [{'image': 'man.jpg', 'question': ..., 'answer': 'umbrella', 'probability': 0.97, 'error': None}]
        """
        table = read_question_rows(
            rows,
            question_column=question_column,
            image_column=image_column,
            image_name=image_name,
            question_id_column=question_id_column,
            delimiter=delimiter,
            encoding=encoding,
            sheet=sheet,
        )
        if image_folder and table.questions and not any(question.images for question in table.questions):
            raise ValueError("image_folder is given, but no row has an image; name their column with image_column")
        if image_folder and not Path(expand_home(image_folder)).is_dir():
            raise NotADirectoryError(
                f"image_folder {image_folder} is not a directory; give the one that holds the images"
            )
        sampling = Sampling(temperature, top_p, 1, max_new_tokens, seed)
        answers = _answer(self.session, table, image_folder, sampling, batch_size=batch_size, progress=progress)
        return table.with_columns(_columns(answers))


def _answer(
    session: Session,
    table: QuestionRows,
    folder: str | os.PathLike[str],
    sampling: Sampling,
    *,
    batch_size: int | None,
    progress: bool,
) -> list[Answer]:
    """Return the answer of each row."""
    questions, workers = table.questions, 0 if table.held else None  # processes would need copies of what is held
    with table.images(folder) as images:
        found = answer_batch(
            session, questions, images, sampling, with_scores=True, batch_size=batch_size, workers=workers
        )
        with contextlib.closing(found), tqdm(found, total=len(questions), unit="question", disable=not progress) as bar:
            answers = {answer.question.question_id: answer for answer in bar}
    return [answers[row] for row in range(len(questions))]


def _columns(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """Return the columns that `ask_many` adds."""
    return {
        "answer": [answer.text for answer in answers],
        "probability": [math.exp(answer.scores["logprob"]) if answer.scores else None for answer in answers],
        "error": [answer.message if answer.error else None for answer in answers],
    }


def _read_images(source: ImageLike | Sequence[ImageLike] | None) -> list[Image.Image]:
    """Return the images of a question, upright and in RGB."""
    try:
        images = read_cell(source)
    except ValueError as error:
        raise TypeError(f"image is {error}") from error
    return [_open(image) for image in images]


def _open(image: str | bytes | Image.Image) -> Image.Image:
    if isinstance(image, str):
        return load_image(expand_home(image))
    return to_rgb(image) if isinstance(image, Image.Image) else decode_image(image, "given as bytes")
