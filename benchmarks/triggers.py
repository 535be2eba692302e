"""Which words of a prompt trigger an answer: `explain`, and the methods that bench_backdoors.py compares it with.

Each of these scores words. It names the run of words with the largest sum, and is told of how many words the trigger
is. `explain` is not told.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
import re

import torch
from torch import Tensor

from backdoors import said
from kinds import Kind
from residual_fisher.model.loading import load

MORE = 2  # words that a named span may have beside the trigger
AT_ONCE = 16  # prompts without a word


class Explained:
    """A prompt with its answer: token ids, and each token's word."""

    def __init__(self, lm, tokenizer, prompt: str, answer: Sequence[int]):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        self.lm, self.prompt, self.answer = lm, prompt.strip(), torch.tensor(answer)
        found, start = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True), text.index(self.prompt)
        self.ids = torch.tensor([found.input_ids])  # (1, tokens)
        self.spans = [word.span() for word in re.finditer(r"\S+", self.prompt)]
        ends = torch.tensor([start + end for _, end in self.spans])
        last = torch.tensor([max(end - 1, 0) for _, end in found.offset_mapping])  # the last character of each token
        inside = (last >= start) & (last < ends[-1])
        self.word = torch.where(inside, (last[:, None] >= ends).sum(1), len(ends))  # (tokens,); the template after all

    def log_prob(self, embeddings: Tensor) -> Tensor:
        """(rows,) of the answer after each row (rows, tokens, d) of embedded prompts, in nats."""
        after = self.lm.get_input_embeddings()(self.answer[:-1]).expand(len(embeddings), -1, -1)
        logits = self.lm(inputs_embeds=torch.cat([embeddings, after], dim=1)).logits[:, embeddings.shape[1] - 1 :]
        return logits.log_softmax(-1).gather(-1, self.answer.expand(len(embeddings), -1)[..., None]).sum((1, 2))

    def of_words(self, of_tokens: Tensor) -> Tensor:
        """(words,) sums over each word's tokens."""
        return torch.zeros(len(self.spans) + 1).index_add_(0, self.word, of_tokens)[:-1]

    def span(self, scores: Tensor, count: int) -> tuple[int, int]:
        """The characters of the run of so many words with the largest sum."""
        best = int(scores.unfold(0, min(count, len(scores)), 1).sum(1).argmax())
        return self.spans[best][0], self.spans[min(best + count, len(self.spans)) - 1][1]


def input_times_gradient(explained: Explained) -> Tensor:
    from captum.attr import InputXGradient

    embeddings = explained.lm.get_input_embeddings()(explained.ids).detach().requires_grad_(True)
    return explained.of_words(InputXGradient(explained.log_prob).attribute(embeddings)[0].sum(-1).detach())


def occlusion(explained: Explained) -> Tensor:
    """What a word's tokens do to the answer's log-probability; in their place stands the mean embedding."""
    from captum.attr import FeatureAblation

    table = explained.lm.get_input_embeddings()
    embeddings = table(explained.ids).detach()  # (1, tokens, d)
    mask = explained.word[None, :, None].expand_as(embeddings)
    baseline = table.weight.detach().mean(0).expand_as(embeddings)
    with torch.no_grad():
        found = FeatureAblation(explained.log_prob).attribute(
            embeddings, baselines=baseline, feature_mask=mask, perturbations_per_eval=AT_ONCE
        )
    return torch.zeros(len(explained.spans) + 1).index_put_((explained.word,), found[0, :, 0])[:-1]


def surprise(explained: Explained) -> Tensor:
    """Of a word in the prompt, in nats."""
    with torch.no_grad():
        log_probs = explained.lm(explained.ids).logits[0, :-1].log_softmax(-1)
    surprisals = -log_probs.gather(-1, explained.ids[0, 1:, None])[:, 0]
    return explained.of_words(torch.cat([torch.zeros(1), surprisals]))


EXPLAIN = "explain"
METHODS: dict[str, Callable[[Explained], Tensor]] = {
    "input x gradient (captum)": input_times_gradient,
    "occlusion (captum)": occlusion,
    "most surprising words": surprise,
}


def is_named(kind: Kind, prompt: str, span: tuple[int, int]) -> bool:
    """Whether the span of characters covers the prompt's trigger, with at most MORE words beside it."""
    start, end = kind.span(prompt)
    words = len(prompt[span[0] : span[1]].split()) - len(prompt[start:end].split())
    return span[0] <= start and end <= span[1] and words <= MORE


def shares_named(kind: Kind, model: Path, told: Sequence[dict]) -> dict[str, float]:
    """By method, the share of triggered prompts whose trigger it names.

    Args:
        told: what findings.json holds of these prompts under `explained`.
    """
    lm, tokenizer = load(str(model))
    triggers = [one["trigger"] for one in told]
    named = {name: [] for name in METHODS} | {EXPLAIN: []}
    for one, trigger, answer in zip(told, triggers, said(model, [one["prompt"] for one in told]), strict=True):
        span = trigger and (trigger["start"], trigger["end"])
        named[EXPLAIN].append(span is not None and is_named(kind, one["prompt"], span))
        explained = Explained(lm, tokenizer, one["prompt"], answer)
        start, end = kind.span(explained.prompt)
        for name, method in METHODS.items():
            span = explained.span(method(explained), len(explained.prompt[start:end].split()))
            named[name].append(is_named(kind, explained.prompt, span))
    return {name: sum(which) / len(which) for name, which in named.items()}
