"""The messages in docs/tables.md are those of the code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_each_message_of_the_page_is_in_the_code():
    page = (ROOT / "docs/tables.md").read_text(encoding="utf-8").partition("## Messages")[2]
    messages = [text for row in re.findall(r"^\| (`.*?`) \|", page, re.M) for text in re.findall(r"`([^`]+)`", row)]
    sources = [*(ROOT / "llava/data/table").glob("*.py"), ROOT / "task_data_preprocessing.py"]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\s*\n\s*f?"', "", code).replace("{DEFAULT_IMAGE_TOKEN!r}", "'<image>'").replace("{{id}}", "{id}")
    assert len(messages) > 20
    for message in messages:
        parts = [
            part.strip(" ,;():")
            for part in re.split(r"…|cp1251|UTF-8: |pass |\b2\b|18|question(?:_id)?\b|answer\b", message)
        ]
        assert [part for part in parts if part and part not in code] == [], message
