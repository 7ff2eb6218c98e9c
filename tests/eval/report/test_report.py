"""The report: what is in the page, that hostile text stays text, and that a browser shows and filters it."""

import base64
import csv
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from llava.eval.report.__main__ import build_parser, main
from llava.eval.report.page import encode_json, make_environment

ACT = "document.documentElement.dataset.hacked=1"
HOSTILE = f"\"'></script></style><script>{ACT}</script><img src=x onerror={ACT}><svg onload={ACT}>]]>--!>&lt;"


@pytest.fixture
def world(tmp_path):
    """Six questions about three images, two answer files, true answers; returns the function (flags) -> page."""
    images = tmp_path / "images"
    images.mkdir()
    for name, colour in (("red.jpg", "red"), ("blue.jpg", "blue")):
        Image.new("RGB", (64, 48), colour).save(images / name)
    questions = [
        ("Is it red?", "red.jpg", "yes", "exist", "yes", "no"),
        ("What colour is it?", "red.jpg", "red", "colour", "blue", "Red."),
        ("What colour is it?", "blue.jpg", "blue", "colour", "blue", "blue"),
        ("How many?", "gone.jpg", "2", "count", "3", "two"),
        ("Is it blue?", "red.jpg", "no", "exist", None, "no"),
        ("Say something", None, "hello", "talk", "bye", "hi"),
    ]
    write = {"questions": [], "truth": [], "base": [], "tuned": []}
    for number, (text, image, true, kind, base, tuned) in enumerate(questions, start=1):
        write["questions"].append({"question_id": number, "image": image, "text": text})
        write["truth"].append({"question_id": number, "answer": true, "kind": kind})
        error = {"error": "image_corrupt", "metadata": {"error": "image_corrupt", "message": "fetch it again"}}
        base_record = {"question_id": number, "text": base or "", "metadata": {"logprob": -0.1 * number}}
        write["base"].append(base_record if base else {**base_record, **error})
        noted = {"logprob": -0.5, "runner_up": "maybe", "runner_up_logprob": -1.5}
        write["tuned"].append({"question_id": number, "text": tuned, "metadata": noted})
    for name, records in write.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def report(*flags, answers=("base", "tuned"), annotations=True):
        command = ["--answers", *(str(tmp_path / f"{name}.jsonl") for name in answers), "--questions",
                   str(tmp_path / "questions.jsonl"), "--images", str(images), "-o", str(tmp_path / "report.html"),
                   "--workers", "0", *(["--annotations", str(tmp_path / "truth.jsonl")] if annotations else []),
                   *flags]  # fmt: skip
        assert main(command) == 0
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    report.folder = tmp_path
    return report


class Reader(HTMLParser):
    """Collects the elements with their attributes, and the content of scripts and styles."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.blocks, self.texts = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.blocks.append((dict(attrs).get("id", tag), []))

    def handle_data(self, data):
        if self.cdata_elem:
            self.blocks[-1][1].append(data)
        self.texts.append(data)

    def block(self, name):
        return next("".join(parts) for key, parts in self.blocks if key == name)

    def data(self):
        return json.loads(self.block("data"))


def test_rows_of_the_page(world, capsys):
    data = Reader(world()).data()
    assert data["files"] == ["base", "tuned"]
    assert data["kinds"] == ["colour", "count", "exist", "talk"]
    assert data["types"] == ["yes/no", "number", "other"]
    assert sorted(data["images"]) == [
        ["blue.jpg", 64, 48, None], ["gone.jpg", 0, 0, "image_missing"], ["red.jpg", 64, 48, None]
    ]  # fmt: skip
    first, fifth, last = data["rows"][0], data["rows"][4], data["rows"][5]
    red = [name for name, *_ in data["images"]].index("red.jpg")
    assert first == ["1", "Is it red?", [red], 2, 0, [["yes", 1]],
                     [["yes", 1.0, 0.9048, None, None, None], ["no", 0.0, 0.6065, None, "maybe", 0.2231]]]  # fmt: skip
    assert fifth[6][0] == [None, 0.0, None, "image_corrupt: fetch it again", None, None]
    assert last[2] == []
    size = (world.folder / "report.html").stat().st_size / 1e3
    assert capsys.readouterr().out == (f"wrote {world.folder / 'report.html'}: 6 questions, 3 images, {size:.1f} kB\n")


@pytest.mark.parametrize("name", ["textvqa/llava_textvqa_val_v051_ocr.jsonl", "MME/llava_mme.jsonl"])
def test_each_question_has_its_own_answer_although_ids_repeat(shared_path, tmp_path, name):
    questions, answers = shared_path(f"eval/{name}"), shared_path(f"eval/{name.split('/')[0]}/answers")
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    given = [json.loads(line) for line in (answers / "llava-v1.5-13b.jsonl").read_text().splitlines()]
    reordered = tmp_path / "reordered.jsonl"
    reordered.write_text("".join(json.dumps(record) + "\n" for record in given[::-1]))
    truth = tmp_path / "truth.jsonl"
    lines = [{"question_id": row["question_id"], "answer": str(place)} for place, row in enumerate(rows)]
    lines = [{**line, "question": row["text"].split("\n")[0]} for line, row in zip(lines, rows, strict=True)]
    truth.write_text("".join(json.dumps(line) + "\n" for line in lines[::-1]))
    command = ["--answers", str(reordered), "--questions", str(questions), "--images", str(tmp_path)]
    command += ["--annotations", str(truth), "-o", str(tmp_path / "report.html"), "--workers", "0"]
    assert main(command) == 0
    shown = Reader((tmp_path / "report.html").read_text(encoding="utf-8")).data()["rows"]
    assert [(row[0], row[1], row[6][0][0]) for row in shown] == [
        (row["question_id"], row["text"], record["text"]) for row, record in zip(rows, given, strict=True)
    ]
    assert [row[5][0][0] for row in shown] == [str(place) for place in range(len(rows))]


def test_each_image_is_in_the_page_once(world):
    reader = Reader(world())
    encoded = reader.block("thumbnails").split("\n")
    names = [name for name, *_ in reader.data()["images"]]
    assert len(encoded) == len(names) == 3
    assert encoded[names.index("gone.jpg")] == ""
    assert base64.b64decode(encoded[names.index("red.jpg")]).startswith(b"\xff\xd8\xff")


def test_scores_comparison_and_plots_are_in_the_page(world):
    page = world()
    text = re.sub(r"<[^>]+>", " ", page)
    assert "33.3" in text and "66.7" in text  # 2 and 4 of 6
    assert "+33.3" in text and "not settled: may be chance" in text
    assert "3 questions better, 1 worse" in text
    assert page.count('<svg class="track"') == 2 + 5 + 4  # two files; four kinds and all; three answer types and all
    assert re.findall(r'<g class="(file\d)">', page) == ["file0", "file1"] * (1 + 5 + 4)
    assert page.count('<svg class="plot') == 2
    assert page.count('<table class="confusion"') == 2
    assert "Images that can't be shown: image_missing 1." in html.unescape(page)


def test_answers_without_annotations_or_scores(world):
    page = world(annotations=False, answers=("tuned",))
    reader = Reader(page)
    assert ("h1", {}) in reader.elements
    assert "What the model answers" in reader.texts
    assert 'id="scores"' not in page
    assert reader.data()["rows"][0][4:6] == [None, []]
    assert reader.data()["rows"][0][6][0][1] is None
    assert reader.data()["kinds"] == ["how many?", "is it", "say something", "what colour"]


def test_the_same_files_give_the_same_page(world):
    assert world("--workers", "2") == world("--workers", "0")


def test_ids_beyond_javascripts_whole_numbers_stay_exact(world):
    folder = world.folder
    for name in ("questions", "truth", "base", "tuned"):
        path = folder / f"{name}.jsonl"
        path.write_text(path.read_text().replace('"question_id": 1,', '"question_id": 123456789012345678,'))
    assert Reader(world()).data()["rows"][0][0] == "123456789012345678"


def test_max_images_shows_those_with_mistakes_first(world):
    page = world("--max-images", "1")
    data = Reader(page).data()
    assert [name for name, *_ in data["images"]] == ["red.jpg"]
    assert [row[0] for row in data["rows"]] == ["1", "2", "5", "6"]
    assert "The gallery shows 4 of 6 questions, those about 1 of 3 images (--max-images)" in page
    assert "66.7" in page  # the scores count all


def test_a_budget_that_cannot_be_kept_is_said(world, capsys):
    world("--max-megabytes", "0.0001")
    assert re.fullmatch(
        r"wrote .*: 6 questions, 3 images, \d\d\.\d kB\n"
        r"the images take \d+ bytes, more than --max-megabytes 0\.0001; --max-images N shows fewer of them\n",
        capsys.readouterr().out,
    )


def test_files_that_belong_together_only_in_part_say_so(world):
    folder = world.folder
    lines = (folder / "tuned.jsonl").read_text().splitlines()
    (folder / "tuned.jsonl").write_text(
        "\n".join([*lines[1:], lines[0].replace('"question_id": 1', '"question_id": 99')])
    )
    page = html.unescape(world())
    assert "Not scored: tuned: questions without an answer: 1 of 6 (1)." in page
    assert "tuned: 1 answers belong to no question of the question file and are not shown." in page
    assert "tuned: 1 of 6 questions have no answer in this file." in page
    assert Reader(world()).data()["rows"][0][6][1] is None


# --- nothing acts but the page's own script --------------------------------------------------------------------------


def hostile_report(folder):
    """A page whose every text, name and id tries to act."""
    name = HOSTILE.replace("/", "") + ".jpg"  # a file's name, so without slashes
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / "real.jpg")
    shutil.copy(folder / "images" / "real.jpg", folder / "images" / "<img src=x onerror=alert(1)>.jpg")
    images = [name, "<img src=x onerror=alert(1)>.jpg", f"../{HOSTILE}", "real.jpg"]
    questions = [{"question_id": f"{HOSTILE}{n}", "image": image, "text": f"{HOSTILE} \u2028\u202e\0 {n}"}
                 for n, image in enumerate(images)]  # fmt: skip
    truth = [{"question_id": q["question_id"], "answer": HOSTILE, "kind": HOSTILE, "answer_type": HOSTILE}
             for q in questions]  # fmt: skip
    noted = {"logprob": -1.0, "runner_up": HOSTILE, "runner_up_logprob": -2.0}
    answers = [{"question_id": q["question_id"], "text": f"{HOSTILE}\ud800", "metadata": noted} for q in questions]
    answers[1] |= {"error": HOSTILE, "metadata": {"message": HOSTILE}}
    other = [{**answer, "text": "javascript:alert(1)"} for answer in answers]
    files = {"q.jsonl": questions, "t.jsonl": truth, "<b>&a.jsonl": answers, "'x\".jsonl": other}
    for file, records in files.items():
        (folder / file).write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["--answers", str(folder / "<b>&a.jsonl"), str(folder / "'x\".jsonl"), "--questions",
                 str(folder / "q.jsonl"), "--images", str(folder / "images"), "--annotations", str(folder / "t.jsonl"),
                 "--title", HOSTILE, "-o", str(folder / "hostile.html"), "--workers", "0"]) == 0  # fmt: skip
    return folder / "hostile.html"


def test_hostile_text_makes_no_element_and_no_attribute(tmp_path, world):
    reader = Reader(hostile_report(tmp_path).read_text(encoding="utf-8"))
    usual = {(tag, *sorted(attrs)) for tag, attrs in Reader(world()).elements}
    assert {(tag, *sorted(attrs)) for tag, attrs in reader.elements} <= usual
    assert [tag for tag, _ in reader.elements].count("script") == 3
    for tag, attrs in reader.elements:
        assert not any(name.startswith("on") or name in ("style", "src", "srcset", "action") for name in attrs), tag
        assert attrs.get("href", "#").startswith("#")
    row = reader.data()["rows"][0]
    assert row[1].startswith(HOSTILE) and row[6][0][0] == f"{HOSTILE}\ufffd"
    assert [problem for *_, problem in reader.data()["images"]].count("path_outside_folder") == 1


def test_the_policy_allows_the_pages_own_script_and_style_and_no_network(world):
    reader = Reader(world())
    policy = next(attrs["content"] for tag, attrs in reader.elements if attrs.get("http-equiv"))
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))

    def own(block):
        return f"'sha256-{base64.b64encode(hashlib.sha256(reader.block(block).encode()).digest()).decode()}'"

    assert directives == {
        "default-src": "'none'", "img-src": "data:", "style-src": own("style"), "script-src": own("script"),
        "base-uri": "'none'", "form-action": "'none'", "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }  # fmt: skip
    tags = [tag for tag, _ in reader.elements]
    assert tags.index("meta") < tags.index("script")
    assert not {"link", "iframe", "object", "embed", "base"} & set(tags)
    for block in ("style", "script"):
        assert not re.search(r"https?://|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(",
                             reader.block(block))  # fmt: skip


def test_json_for_a_script_element():
    encoded = encode_json(["</script><!--&", "é 😀\0", "\ud800"])
    assert encoded == '["\\u003c/script\\u003e\\u003c!--\\u0026","é 😀\\u0000","\ufffd"]'
    assert json.loads(encoded) == ["</script><!--&", "é 😀\0", "\ufffd"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_json([float("nan")])


def test_templates_escape_and_cut_every_value():
    render = make_environment().from_string("{{ value }}").render
    assert render(value='<a href="x">\'&\ud800\0') == "&lt;a href=&#34;x&#34;&gt;&#39;&amp;\ufffd\ufffd"
    assert len(render(value="x" * 10_000)) < 2_100


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browse():
    """Return the function (page, address after #) -> its elements after the script ran, as Chromium writes them."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium here; install one, or name it in the variable CHROMIUM")

    def dump(page: Path, state: str = "") -> str:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                   "--disable-background-networking", "--disable-component-update",
                   f"--user-data-dir={page.parent / 'browser'}", "--dump-dom", f"{page.as_uri()}#{state}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert 'data-ready="true"' in done.stdout, done.stderr
        return done.stdout

    return dump


def shown_ids(document):
    return re.findall(r"#(\d+)</span></p></div></li>", document)


@pytest.mark.slow
def test_filters_sorting_and_paging_in_a_browser(world, browse):
    world()
    page = world.folder / "report.html"
    plain = browse(page)
    assert shown_ids(plain) == ["1", "6", "2", "3", "4", "5"]  # wrong ones first
    assert plain.count("<img ") == 4 and "image missing" in plain
    assert re.findall(r"<span>(\w[\w ]*) <b>(\d+)</b>", plain) == [
        ("All", "6"), ("Wrong", "2"), ("Right", "4"), ("No answer", "0"), ("Fixed", "3"), ("Broken", "1"),
        ("Different", "5"),
    ]  # fmt: skip
    assert shown_ids(browse(page, "show=fixed")) == ["2", "4", "5"]
    assert shown_ids(browse(page, "show=broken&kind=2")) == ["1"]
    assert shown_ids(browse(page, "q=COLOUR+blue&sort=order")) == ["2", "3"]
    assert shown_ids(browse(page, "file=0&show=error")) == ["5"]
    assert shown_ids(browse(page, "file=0&sort=sure")) == ["1", "2", "3", "4", "6", "5"]
    # What the address can't mean is ignored; a page beyond the last is the last.
    assert shown_ids(browse(page, "show=nonsense&size=7&constructor=x&page=99&sort=order")) == list("123456")


DRIVE = """<script>
const said = [], tiles = () => [...document.querySelectorAll(".tile .tags")].map((tags) => tags.lastChild.textContent);
const say = (...words) => said.push([...words, document.querySelector(".pager output").textContent].join(" "));
const press = (key, target) =>
  target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const form = document.getElementById("controls"), dialog = document.getElementById("detail");
press("ArrowRight", document.body); say("right");
press("ArrowLeft", document.body); say("left");
press("/", document.body); say(document.activeElement.id);
press("ArrowRight", document.activeElement); say("right while typing");
document.querySelectorAll(".pager")[1].querySelector("[data-step='1']").click(); say("next below");
document.querySelector(".page-number").value = "99";
document.querySelector(".page-number").dispatchEvent(new Event("change")); say("page 99");
form.elements.q.value = "red"; form.dispatchEvent(new Event("input")); say("red", tiles());
document.querySelector(".images").click();
say(dialog.open, document.getElementById("detail-title").textContent, dialog.querySelectorAll(".question").length);
document.getElementById("detail-close").click(); say(dialog.open, location.hash);
document.documentElement.dataset.said = said.join("|");
</script></body>"""


@pytest.mark.slow
def test_keys_pages_search_and_the_view_of_one_image_in_a_browser(world, browse):
    page = world()
    # The policy would stop the driving script; the copy has none, and pages of 2 questions.
    page = re.sub(r"<meta http-equiv[^>]*>", "", page).replace('<option value="24"', '<option value="2"', 1)
    driven = world.folder / "driven.html"
    driven.write_text(page.replace("</body>", DRIVE), encoding="utf-8")
    said = html.unescape(re.search(r'data-said="([^"]*)"', browse(driven)).group(1))
    assert said.split("|") == [
        "right 3 to 4 of 6 questions",
        "left 1 to 2 of 6 questions",
        "search 1 to 2 of 6 questions",
        "right while typing 1 to 2 of 6 questions",
        "next below 3 to 4 of 6 questions",
        "page 99 5 to 6 of 6 questions",
        "red #1,#2 1 to 2 of 3 questions",
        "true red.jpg 3 1 to 2 of 3 questions",
        "false #q=red 1 to 2 of 3 questions",
    ]


@pytest.mark.slow
def test_hostile_text_does_nothing_in_a_browser(tmp_path, browse):
    document = browse(hostile_report(tmp_path))
    root = re.search(r"<html[^>]*>", document).group()
    assert "hacked" not in root
    reader = Reader(document)
    assert [attrs.get("class") for _, attrs in reader.elements].count("tile") == 4
    assert not [attrs for _, attrs in reader.elements if any(name.startswith("on") for name in attrs)]
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for tag, attrs in reader.elements if tag == "img")


@pytest.mark.slow
def test_ten_thousand_images_stay_usable(tmp_path, browse):
    """As many questions as a big run has, over 10,000 images: the page keeps its budget and shows one page of it."""
    (tmp_path / "images").mkdir()
    source = tmp_path / "images" / "0.jpg"
    Image.effect_noise((64, 48), 60).convert("RGB").save(source)
    names = [f"{number}.jpg" for number in range(10_000)]
    for name in names[1:]:
        (tmp_path / "images" / name).hardlink_to(source)
    with (tmp_path / "q.jsonl").open("w") as questions, (tmp_path / "a.jsonl").open("w") as answers:
        for number in range(40_000):
            question = {"question_id": number, "image": names[number // 4], "text": f"What is thing {number}?"}
            questions.write(json.dumps(question) + "\n")
            answers.write(json.dumps({"question_id": number, "text": "cat" if number % 3 else "dog"}) + "\n")
    page = tmp_path / "report.html"
    assert main(["--answers", str(tmp_path / "a.jsonl"), "--questions", str(tmp_path / "q.jsonl"), "--images",
                 str(tmp_path / "images"), "-o", str(page), "--max-megabytes", "20"]) == 0  # fmt: skip
    thumbnails = page.read_text(encoding="utf-8").split('id="thumbnails">')[1].split("</script>")[0]
    assert thumbnails.count("\n") == 9_999
    assert len(thumbnails) < 20e6
    document = browse(page, "page=3&q=thing")
    assert "49 to 72 of 40,000 questions" in document
    assert document.count('<li class="tile">') == 24


def test_a_table_of_questions_and_answers_gives_the_page_of_its_lines(world, tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines() if "null" not in line]
    truth = {line["question_id"]: line for line in map(json.loads, (tmp_path / "truth.jsonl").open())}
    joined = [line | truth[line["question_id"]] for line in lines]
    rows = [[line[key] for key in ("image", "text", "question_id", "answer", "kind")] for line in joined]
    with (tmp_path / "table.csv").open("w", encoding="utf-16", newline="") as stream:
        csv.writer(stream, delimiter="\t").writerows([("image", "question", "question_id", "answer", "kind"), *rows])
    for name, content in (("questions", lines), ("truth", [truth[line["question_id"]] for line in lines])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    for name in ("base", "tuned"):
        kept = (tmp_path / f"{name}.jsonl").read_text().splitlines()[: len(lines)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
    table = str(tmp_path / "table.csv")
    assert world("--questions", table, "--annotations", table) == world()


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--thumbnail-size", "20"], "--thumbnail-size is 20; choose 48 or more"),
        (["--max-images", "-1"], "--max-images is -1; choose 0 or more"),
        (["--max-megabytes", "nan"], "--max-megabytes is nan; choose 0 or more"),
        (["--workers", "-2"], "--workers is -2; choose 0 or more"),
        (
            ["--kind-key", "x"],
            "--kind-key has no effect without --annotations; add --annotations, or leave it out",
        ),
        (["--unanimous", "verbatim"], "--unanimous has no effect without --annotations"),
        (
            ["--annotations", "t.jsonl", "--answer_column", "x"],
            "--answer_column has no effect for --annotations t.jsonl, which is not a table",
        ),
        (["--answer_column", "x"], "--answer_column has no effect without --annotations"),
        (
            ["--annotations", "t.jsonl", "--sheet", "x"],
            "--sheet has no effect for --questions q and --annotations t.jsonl, which is not a table",
        ),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--answers", "a", "--questions", "q", "--images", "i", "-o", "o", *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def run(world, *flags):
    folder = world.folder
    return main(["--answers", str(folder / "base.jsonl"), "--questions", str(folder / "questions.jsonl"), "--images",
                 str(folder / "images"), "-o", str(folder / "report.html"), "--workers", "0", *flags])  # fmt: skip


def test_files_that_cannot_be_used(world, capsys):
    assert run(world, "--images", "nowhere") == 1
    assert capsys.readouterr().err == ("error: --images nowhere is not a directory; give the directory of the images\n")
    other = world.folder / "other.jsonl"
    other.write_text('{"question_id": 77, "text": "x"}\n')
    assert run(world, "--questions", str(other)) == 1
    assert (
        "no question of the question file is answered; check that the files belong together" in capsys.readouterr().err
    )
    assert run(world, "--annotations", str(world.folder / "none.csv")) == 1
    assert "none.csv" in capsys.readouterr().err
    assert not (world.folder / "report.html").exists()


def test_a_failed_or_stopped_run_leaves_the_previous_page(world, monkeypatch, capsys):
    page = world()

    def stop(*_):
        raise KeyboardInterrupt

    def fail(*_):
        raise ValueError("not finite")

    monkeypatch.setattr("llava.eval.report.thumbnails.make_thumbnails", stop)
    assert run(world) == 130
    assert "report.html is unchanged; run the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("llava.eval.report.page.encode_json", fail)
    assert run(world) == 1
    assert capsys.readouterr().err == "error: not finite\n"
    assert (world.folder / "report.html").read_text(encoding="utf-8") == page
    assert sorted(path.name for path in world.folder.glob(".*")) == []


def test_the_other_programs_names_of_flags_work():
    command = "--answers-file a b --question-file q --image-folder i --output o"
    args = build_parser().parse_args(command.split())
    assert (args.answers, args.questions, args.images, args.output) == (["a", "b"], "q", "i", "o")


def test_the_pages_style_and_script_are_installed(tmp_path):
    """A wheel, which is what an install that is not editable copies, holds all files of the package."""
    root = Path(__file__).resolve().parents[3]
    shutil.copytree(root / "llava", tmp_path / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--wheel-dir", str(tmp_path / "wheel"), str(tmp_path)]  # fmt: skip
    subprocess.run(command, check=True, timeout=120)
    [wheel] = (tmp_path / "wheel").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("llava/")}
    assert packed == {
        path.relative_to(tmp_path).as_posix() for path in (tmp_path / "llava").rglob("*") if path.is_file()
    }


def test_long_texts_are_cut_in_the_page(world):
    long = "word " * 200_000
    for name in ("base.jsonl", "questions.jsonl"):
        path = world.folder / name
        records = [json.loads(line) for line in path.read_text().splitlines()]
        records[0]["text"] = long
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = world()
    assert len(page) < 200_000
    row = Reader(page).data()["rows"][0]
    assert row[1].startswith("word word") and "characters left out" in row[1]
    assert len(row[1]) < 2_100 and len(row[6][0][0]) < 2_100
