"""HTML report of answer files; `python -m llava.eval.report` writes it."""
