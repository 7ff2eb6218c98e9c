"""How often answers of the batch engine equal those asked one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from infer_bench import ANSWER_TOKENS, Bench, image_reader

from llava.inference.batch.answer_batch import answer_batch
from llava.inference.session import Sampling


@torch.no_grad()
def measure_agreement(bench: Bench) -> Iterator[dict[str, Any]]:
    """The share of questions whose answer in a batch equals that of `generate` asked one at a time."""
    session, count = bench.session, bench.options.compared
    questions = bench.questions(bench.options.images)[:count]
    reader = image_reader(bench)
    greedy = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    texts = {}
    for question in questions:
        ids = torch.tensor([session.prompt_ids(question.text, 1)], device=bench.device)
        images = reader.load(question.images)
        [tokens] = session.model.generate(ids, images=images, attention_mask=torch.ones_like(ids), **greedy)
        texts[question.question_id] = session.decode(tokens.tolist())
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
    rows = answer_batch(session, questions, bench.folder, sampling, compile_mode=bench.compile_mode, workers=0)
    yield {
        "part": "agreement",
        "case": f"ours in a batch against generate one at a time, {count} questions",
        "same_answers": sum(row.text == texts[row.question.question_id] for row in rows) / count,
    }
