"""The little world: pictures and questions follow from a seed, and every answer is the one its scene demands."""

import csv
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY = Path(__file__).resolve().parents[1] / "examples/shapes_world"
sys.path.insert(0, str(TINY))

import make_world  # noqa: E402
from drawing import draw_scene, encode_jpeg  # noqa: E402
from questions import FORMS, NEW_KINDS, OLD_KINDS, Question, ask  # noqa: E402
from scenes import CANVAS, COLORS, HUES, SHAPES, Scene, Thing, sample_scene  # noqa: E402

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random(5)
    return [sample_scene(rng) for _ in range(200)]


def select(scene: Scene, phrase: str) -> list[Thing]:
    """Read a phrase word by word, as a person would; plurals too."""
    place = re.fullmatch(r"thing at the (.+)", phrase)
    if place:
        words = place[1].split()
        row, column = ("middle", "middle") if words == ["center"] else words
        return [t for t in scene.things if (ROWS[t.row], COLUMNS[t.column]) == (row, column)]
    words = {word.removesuffix("s") for word in phrase.split()} - {"thing"}
    return [thing for thing in scene.things if words <= {thing.shape, thing.color, thing.size}]


def only(scene: Scene, phrase: str) -> Thing:
    (thing,) = select(scene, phrase)
    return thing


def holds(thing: Thing, predicate: str) -> bool:
    predicate = predicate.removeprefix("a ")
    if predicate.startswith("at the "):
        word = predicate.removeprefix("at the ")
        return word in (ROWS[thing.row], COLUMNS[thing.column])
    return predicate in (thing.shape, thing.color, thing.size)


def solve(scene: Scene, question: Question) -> str:
    """Answer from the text and the things' coordinates alone."""
    text = question.text
    if match := re.fullmatch(r"What (color|shape|size) is the (.+)\?", text):
        return getattr(only(scene, match[2]), match[1])
    if match := re.fullmatch(r"Is the (.+) small or large\?", text):
        return only(scene, match[1]).size
    if match := re.fullmatch(r"Where is the (.+)\?", text):
        thing = only(scene, match[1])
        row, column = int(thing.y // (CANVAS / 3)), int(thing.x // (CANVAS / 3))
        return "center" if row == column == 1 else f"{ROWS[row]} {COLUMNS[column]}"
    if match := re.fullmatch(r"Is there a (.+?)(?: and a (.+))?\?", text):
        return yes_no(all(select(scene, phrase) for phrase in match.groups() if phrase))
    if text == "How many things are there?":
        return str(len(scene.things))
    if match := re.fullmatch(r"How many things are at the (.+)\?", text):
        return str(sum(holds(thing, f"at the {match[1]}") for thing in scene.things))
    if match := re.fullmatch(r"Which is (.+), the (.+) or the (.+)\?", text):
        return choose(match[1], match[2], match[3], scene)
    states = r"(at the \w+|a \w+|\w+)"
    if match := re.fullmatch(rf"Is the (.+?) {states} and the (.+?) {states}\?", text):
        return yes_no(holds(only(scene, match[1]), match[2]) and holds(only(scene, match[3]), match[4]))
    match = re.fullmatch(rf"Is the (.+?) {states}\?", text)
    return yes_no(holds(only(scene, match[1]), match[2]))


def yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def choose(word: str, phrase: str, other_phrase: str, scene: Scene) -> str:
    one, other = only(scene, phrase), only(scene, other_phrase)
    score = {
        "bigger": lambda t: t.radius > 9,
        "smaller": lambda t: t.radius < 9,
        "further left": lambda t: -t.x,
        "further right": lambda t: t.x,
        "higher": lambda t: -t.y,
        "lower": lambda t: t.y,
    }.get(word)
    if score:
        return phrase if score(one) > score(other) else other_phrase if score(other) > score(one) else "neither"
    fits = holds(one, word), holds(other, word)
    return {(True, True): "both", (False, False): "neither"}.get(fits, phrase if fits[0] else other_phrase)


@pytest.mark.parametrize("kind", OLD_KINDS + NEW_KINDS)
def test_answers_are_right(scenes, kind):
    rng, tally = random.Random(1), Counter()
    questions = [(scene, ask(kind, scene, rng, tally)) for scene in scenes]
    asked = [(scene, question) for scene, question in questions if question is not None]
    assert len(asked) > 0.6 * len(scenes)
    for scene, question in asked:
        assert question.answer == solve(scene, question), (question, scene.things)


@pytest.mark.parametrize("kind", OLD_KINDS + NEW_KINDS)
def test_answers_are_short_and_balanced(scenes, kind):
    tally: Counter[tuple[str, str]] = Counter()
    rng = random.Random(2)
    answers = [q.answer for scene in scenes for _ in range(4) if (q := ask(kind, scene, rng, tally))]
    assert max(len(answer.split()) for answer in answers) <= 3
    for form in FORMS[kind]:
        shares = [count for (name, _), count in tally.items() if name == form.__name__]
        assert min(shares) >= 0.7 * max(shares), (form.__name__, tally)


def test_relations_have_a_clear_margin(scenes):
    for scene in scenes:
        question = ask("relation", scene, random.Random(3), Counter())
        if question is None:
            continue
        word, phrase, other = re.fullmatch(r"Which is (.+), the (.+) or the (.+)\?", question.text).groups()
        one, two = only(scene, phrase), only(scene, other)
        distance = abs(one.x - two.x) if "further" in word else abs(one.y - two.y)
        assert distance >= 20


def test_old_and_new_kinds_share_no_wording(scenes):
    def openings(kinds):
        rng, tally = random.Random(4), Counter()
        found = [ask(kind, scene, rng, tally) for scene in scenes for kind in kinds]
        return {" ".join(question.text.split()[:3]).rstrip(",") for question in found if question}

    assert not openings(OLD_KINDS) & openings(NEW_KINDS)


def test_same_seed_same_world():
    one, two = (sample_scene(random.Random("seed")) for _ in range(2))
    assert one == two
    assert encode_jpeg(draw_scene(one), 90) == encode_jpeg(draw_scene(two), 90)
    assert sample_scene(random.Random("other")) != one


def test_things_keep_to_their_cells(scenes):
    cell = CANVAS / 3
    for thing in (thing for scene in scenes for thing in scene.things):
        assert thing.column * cell <= thing.x - thing.radius <= thing.x + thing.radius <= (thing.column + 1) * cell
        assert thing.row * cell <= thing.y - thing.radius <= thing.y + thing.radius <= (thing.row + 1) * cell
    assert all(len({(t.row, t.column) for t in scene.things}) == len(scene.things) for scene in scenes)


def test_pictures_show_the_colors(scenes):
    for scene in scenes[:20]:
        picture = draw_scene(scene)
        assert picture.size == (CANVAS, CANVAS) and picture.mode == "RGB"
        hues = np.asarray(picture.convert("HSV"), dtype=float)[:, :, 0] * 360 / 255
        for thing in scene.things:
            x, y = round(thing.x), round(thing.y)
            patch = hues[y - 1 : y + 2, x - 1 : x + 2].ravel()
            distances = {name: np.median(np.abs((patch - hue + 180) % 360 - 180)) for name, hue in HUES.items()}
            assert min(distances, key=distances.get) == thing.color
    assert {thing.color for scene in scenes for thing in scene.things} == set(COLORS)
    assert {thing.shape for scene in scenes for thing in scene.things} == set(SHAPES)


def test_world_on_disk(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--train_scenes", "30", "--infer_scenes", "5"]
    assert make_world.main(arguments) == 0
    with (tmp_path / "data_train/Train_Qs.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["", "image_id", "question", "question_id", "answer", "kind"]
    assert [row[0] for row in rows[1:]] == [str(index) for index in range(len(rows) - 1)]
    assert rows[1][1] == "1000" and rows[1][3] == "1000000" and rows[2][3] == "1000001"
    assert 80 <= len(rows) <= 91
    with (tmp_path / "data_infer/Test_Qs.csv").open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert {row["kind"] for row in table} == {*OLD_KINDS, *NEW_KINDS}
    assert len({row["question_id"] for row in table} | {row[3] for row in rows[1:]}) == len(table) + len(rows) - 1
    names = {path.name for path in (tmp_path / "data_infer/images").iterdir()}
    assert names == {f"COCO_val2014_{image_id:012d}.jpg" for image_id in range(500_000, 500_005)}
    with Image.open(tmp_path / "data_train/images/COCO_val2014_000000001000.jpg") as picture:
        assert picture.size == (CANVAS, CANVAS)
    assert {path.name for path in tmp_path.iterdir()} == {"data_train", "data_infer"}


def test_world_is_made_once(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--train_scenes", "3", "--infer_scenes", "2"]
    make_world.main(arguments)
    before = (tmp_path / "data_train/Train_Qs.csv").read_text(encoding="utf-8")
    (tmp_path / "data_train/data.json").write_text("[]")
    capsys.readouterr()
    make_world.main(arguments)
    assert capsys.readouterr().out.count("exists already") == 2
    assert (tmp_path / "data_train/data.json").exists()
    make_world.main([*arguments, "--seed", "1"])
    assert (tmp_path / "data_train/Train_Qs.csv").read_text(encoding="utf-8") != before


def test_other_data_is_left_alone(tmp_path, capsys):
    (tmp_path / "data_train").mkdir()
    (tmp_path / "data_train/Train_Qs.csv").write_text("mine")
    assert make_world.main(["--output", str(tmp_path)]) == 1
    assert "holds something else; give another --output" in capsys.readouterr().err
    assert (tmp_path / "data_train/Train_Qs.csv").read_text() == "mine"


def test_no_scenes_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_world.main(["--output", str(tmp_path), "--train_scenes", "0"])
    assert "--train_scenes 0: at least one scene is needed" in capsys.readouterr().err
