"""The encoding of a table that is not UTF-8 is named by its letters; what is named decodes the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.table.bad_rows import TableError
from llava.data.table.text_encoding import decode_table, guess_encoding

RUSSIAN = (
    *("какого", "цвета", "машина", "на", "снимке", "сколько", "людей", "стоит", "рядом", "с", "домом", "что", "держит"),
    *("руке", "женщина", "есть", "ли", "здесь", "собака", "красная", "белый", "двое", "зонт", "да", "нет", "Это"),
    *("день", "или", "ночь", "Где", "находится", "кот"),
)
FRENCH = ("où", "est", "le", "café", "préféré", "combien", "de", "pièces", "voit-on", "près", "l'église", "déjà", "été")
POLISH = ("jaki", "kolor", "łódki", "żółty", "źdźbło", "ile", "osób", "stoi", "przed", "domem", "pięć", "gęś", "różowy")


def write(words: list[str], mark: str) -> str:
    return f"image_id{mark}question{mark}answer\n1.jpg{mark}{' '.join(words)}?{mark}{words[0]}\n"


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "cp866"])
@settings(deadline=None)
@given(words=st.lists(st.sampled_from(RUSSIAN), min_size=6, unique=True), mark=st.sampled_from(",;\t"))
def test_russian_is_never_taken_for_another_encoding(encoding, words, mark):
    text = write(words, mark)
    guess = guess_encoding(text.encode(encoding))
    assert guess is not None
    assert guess.encoding == encoding
    assert decode_table(text.encode(encoding), "t.csv", guess.encoding) == (text, [])


@pytest.mark.parametrize(("encoding", "vocabulary"), [("cp1252", FRENCH), ("cp1250", POLISH)])
@settings(deadline=None)
@given(data=st.data())
def test_latin_letters_are_decoded_as_they_were(encoding, vocabulary, data):
    words = [*data.draw(st.permutations(vocabulary)), *data.draw(st.lists(st.sampled_from(vocabulary)))]
    text = write(words, ";")
    assert text.encode(encoding).decode(guess_encoding(text.encode(encoding)).encoding) == text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("image;question\n1;КАКОГО ЦВЕТА МАШИНА?", "koi8-r"),
        ("image;question\n1;Якого кольору ця машина? Скільки їх?", "cp1251"),
        ("image;question\n1;Якого кольору ця машина? Скільки їх?", "koi8-u"),
        ("image;question\n1;Größe Übung schön über", "cp1252"),
        ("image;question\n1;¿Qué color es el niño?", "cp1252"),
        ("q\nit’s “red” – ok", "cp1252"),
        ("q\narabanın rengi nedir? kırmızı şey", "cp1254"),
        ("q\n車の色は何ですか,赤いです", "shift_jis"),
        ("q\n图片中的车是什么颜色？,红色", "gb18030"),
        ("q\n1,Какой цвет?", "utf-16-le"),
        ("q\n1,Какой цвет?", "utf-16-be"),
    ],
)
def test_other_languages(text, encoding):
    assert guess_encoding(text.encode(encoding)).encoding == encoding


def test_letters_are_looked_for_beyond_a_long_ascii_beginning():
    text = "id,question\n" + "1,What?\n" * 200_000 + "2,Какого цвета машина?\n"
    assert guess_encoding(text.encode("cp1251")).encoding == "cp1251"


@pytest.mark.parametrize("content", [b"", b"plain", "圖片中的車是什麼顏色".encode("big5"), bytes(range(128, 256))])
def test_nothing_is_named_where_nothing_is_sure(content):
    assert guess_encoding(content) is None


def test_damaged_utf8_is_not_taken_for_another_encoding():
    content = "id,вопрос\n1,Какого цвета машина?\n2,да".encode()[:-1]
    assert guess_encoding(content) is None
    with pytest.raises(TableError, match=r"\(line 3\); the rest is UTF-8: correct this text in the table"):
        decode_table(content, "t.csv")


def test_byte_order_marks():
    assert decode_table("é".encode("utf-8-sig"), "t.csv") == ("é", [])
    assert decode_table("é".encode("utf-8-sig"), "t.csv", "utf-8") == ("é", [])
    assert decode_table("é".encode("utf-16"), "t.csv") == ("é", ["the text is in UTF-16 by its byte order mark"])
    assert decode_table("é".encode("utf-16"), "t.csv", "utf-16") == ("é", [])


def test_a_wrong_encoding_is_refused_with_the_likely_one():
    content = "id,вопрос\n1,Какого цвета машина?\n".encode("koi8-r")
    with pytest.raises(TableError, match=r"^t.csv: not utf-16.*; it looks like koi8-r \('вопрос Какого цвета'\): pass"):
        decode_table(content + b"x", "t.csv", "utf-16")
    with pytest.raises(TableError, match=r"^t.csv: not ascii: byte 0xd7 at offset 3 \(line 1\); it looks like koi8-r"):
        decode_table(content, "t.csv", "ascii")
