"""What a run would take: what a dry run says."""

from residual_fisher.common.archives import Item
from residual_fisher.common.estimate import Trial
from residual_fisher.common.text import duration, excerpt_end, size
from residual_fisher.experiment.records import EIGENVECTORS, RESULTS, file_sizes, perturbations
from residual_fisher.experiment.report import EXCERPT

SHOWN = 3  # prompts


def describe_sentences(counts: str, prompts: list[str], most: str) -> str:
    """How many sentences there are, and the first prompts; `most` goes before a number that not all may reach."""
    lines = [f"sentences: {counts}, {most}{len(prompts)} to run:"]
    lines += [f"  {excerpt_end(prompt, EXCERPT)}" for prompt in prompts[:SHOWN]]
    return "\n".join([*lines, "  …"] if len(prompts) > SHOWN else lines)


def representatives(lengths: dict[int, int]) -> list[int]:
    """The numbers of the sentence of median length, and of the longest one."""
    by_length = sorted(lengths, key=lengths.get)
    return sorted({by_length[(len(by_length) - 1) // 2], by_length[-1]}, key=lengths.get)


def describe_costs(
    rounds: list[tuple[float, list[Item]]],
    lengths: dict[int, int],
    others: int,
    finished: int,
    memory: str,
    load_seconds: float,
    most: str,
) -> str:
    """Time, memory and disk.

    Args:
        rounds: seconds and items of each of two rounds over some sentences; the first had to warm up.
        lengths: tokens of the sentences to do, by number.
        others: sentences that are only looked at.
        finished: sentences that the files will have.
    """
    items, numbers = rounds[-1][1], [item.number for item in rounds[-1][1]]
    spent = [{item.number: sum(item.record["seconds"].values()) for item in some} for _, some in rounds]
    each = [min(one[number] for one in spent if number in one) for number in numbers]
    trial = Trial([lengths[number] for number in numbers], each)
    seconds = trial.total(list(lengths.values())) + others * items[-1].record["seconds"]["prefix"]
    seconds += max(0.0, rounds[0][0] - sum(each))  # warming up
    a_sentence = " to ".join(dict.fromkeys(map(duration, sorted(each))))
    record, (json_bytes, npz_bytes) = items[-1].record, file_sizes(items, finished)
    return "\n".join(
        [
            f"each: {perturbations(record)} perturbations at each of {len(record['fisher'])} layers",
            f"time: about {most}{duration(seconds)}, {a_sentence} a sentence; and {duration(load_seconds)} to load the "
            "model",
            f"memory: {memory}, with the longest sentence ({lengths[numbers[-1]]} tokens)",
            f"files: about {most}{size(json_bytes)} {RESULTS}, {size(npz_bytes)} {EIGENVECTORS}, "
            f"{2 + ('steering' in record)} pictures and a page",
        ]
    )
