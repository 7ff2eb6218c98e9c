"""How often answers of the batch engine equal those asked one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from infer_bench import ANSWER_TOKENS, Bench, picture_reader

from llava.inference.backlog import Backlog
from llava.inference.grouped import answer_batch
from llava.inference.grouping import Ask, plan_groups
from llava.inference.picture_source import PictureReader, read_pictures
from llava.inference.questions import Question
from llava.inference.session import Sampling
from llava.inference.tree_cache import TreeCache
from llava.inference.tree_rows import round_up
from llava.model.flat_llama import FlatLlama


@torch.no_grad()
def measure_agreement(bench: Bench) -> Iterator[dict[str, Any]]:
    """How often answers equal those of `generate` asked one at a time, and how far the first logits are apart."""
    session, count = bench.session, bench.options.compared
    questions = bench.questions(bench.options.images)[:count]
    names = [question.images for question in questions]
    reader = picture_reader(bench)
    pixels = [reader.read(row) for row in names]
    greedy = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    greedy |= {"return_dict_in_generate": True, "output_logits": True}
    texts, logits = {}, {}
    for question, row in zip(questions, pixels, strict=True):
        ids = torch.tensor([session.prompt_ids(question.text, 1)], device=bench.device)
        output = session.model.generate(ids, images=row, attention_mask=torch.ones_like(ids), **greedy)
        texts[question.question_id] = session.decode(output.sequences[0].tolist())
        logits[question.question_id] = output.logits[0][0].float()
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
    options = {"compile_mode": bench.compile_mode, "workers": 0}
    ours = {
        row.question.question_id: row for row in answer_batch(session, questions, bench.folder, sampling, **options)
    }
    together = first_logits(bench, questions, reader)
    apart = torch.stack([(together[key] - logits[key]).abs().max() for key in logits])
    spread = torch.stack([row.std() for row in logits.values()]).mean().item()
    first = sum(bool(together[key].argmax() == logits[key].argmax()) for key in logits)
    gaps = torch.stack([row.topk(2).values.diff().abs()[0] for row in logits.values()])
    yield {
        "part": "agreement",
        "case": f"ours in a batch against generate one at a time, {count} questions",
        "same_answers": sum(ours[key].text == texts[key] for key in texts) / count,
        "same_first_token": first / count,
        "logit_difference_median_of_largest": apart.median().item(),
        "logit_difference_largest": apart.max().item(),
        "logit_standard_deviation": spread,
        "gap_of_the_two_likeliest_median": gaps.median().item(),
    }


def first_logits(bench: Bench, questions: Sequence[Question], reader: PictureReader) -> dict[int, torch.Tensor]:
    """Return the logits of each question's first token, computed in groups."""
    session = bench.session
    asks = [Ask(key, session.prompt_ids(question.text, 1), question.images) for key, question in enumerate(questions)]
    plan = plan_groups(asks, session.model.get_vision_tower().num_patches)
    pictures = read_pictures(reader, [group.images for group in plan.groups], workers=0)
    backlog = Backlog(session, len(plan.stem_ids), plan.groups, pictures, room=0, is_padded=False)
    rows = []
    while backlog and backlog.peek():
        rows.append(backlog.take())
    length = round_up(len(plan.stem_ids) + max(row.trunk_length for row in rows) + max(row.length for row in rows))
    cache = TreeCache(FlatLlama(session.model), plan.stem_ids, len(rows), length)
    logits = cache.prefill(rows).float()
    branches = [branch for row in rows for branch in row.group.branches]
    return {questions[branch.ask.key].question_id: row for branch, row in zip(branches, logits, strict=True)}
