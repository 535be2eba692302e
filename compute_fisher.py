"""Fisher information matrices of a dataset's prompts, each compressed to its top singular triplets.

For every prompt, a zero bias is added to the residual stream at one layer, at every token. F is the Fisher
information matrix of the next-token distribution at the prompt's end with respect to that bias: perturbing
the whole residual stream by delta changes the prediction by KL ~ 1/2 delta^T F delta nats. Prompts whose
F is unlike the others' are prompts on which the model behaves unlike itself.

    python compute_fisher.py
    python compute_fisher.py --config configs/llama_8b.yaml --output-dir results
    torchrun --nproc-per-node 8 compute_fisher.py --config configs/lmsys_1b.yaml

Writes fisher_matrices_compressed.npz, prompts.jsonl, metadata.yaml and fisher_spectra.png to the output
directory. Stopped, the same command goes on where it was.
"""

import sys

from common.command_line import INTERRUPTED, UserError, end_with_error, exit_code, model_line, settle_network
from pipeline.settings import Command, Settings, parse

PROGRAM = "compute_fisher.py"

if __name__ == "__main__":  # before the imports below, which take seconds: --help need not wait for torch
    try:
        from_command_line = parse(sys.argv[1:])
    except UserError as error:
        sys.exit(end_with_error(PROGRAM, error))
    settle_network(from_command_line.settings.model_path, from_command_line.settings.dataset)

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
import time

import torch
from tqdm import tqdm

from common.command_line import excerpt
import fisher
from model.loading import describe, find_module, fingerprint, load, longest_prompt, vocabulary_size
from model.passes import ROUNDING_NATS, use_attention
from pipeline import figures, processes, report
from pipeline.block_lanczos import leading_eigenpairs
from pipeline.processes import Processes
from pipeline.prompts import Encoded, Prompt, Prompts, encode, plan_batches
from pipeline.run_directory import FILES, RunDirectory
from pipeline.store import Result, Store

SHARD_BATCHES = 16  # a shard is so many batches' prompts: sorted by length, they need little padding
# Rows (tokens times cotangents) of one backward pass: more of them no longer make better use of the machine.
BACKWARD_ROWS = 4096
# Above this length attention runs in a fused kernel, which keeps no tokens x tokens matrix for the backward
# pass. Below it plain attention is as fast, and many cotangents can share one backward pass.
PLAIN_ATTENTION = 256
# With the whole vocabulary attention stays plain, and keeps about this many such matrices a head and layer.
MATRICES_KEPT = 6
ATTENTION_BYTES = 4 << 30
MAX_WAITING = 2  # batches that may wait to be written


# --- one batch -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """The model under study, and the module that its residual stream is hooked at."""

    model: torch.nn.Module
    tokenizer: object
    path: str  # of the module
    module: torch.nn.Module


def pad(batch: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (prompts, tokens), each row filled up with its own last token, and lengths (prompts,)."""
    longest = max(len(encoded.ids) for encoded in batch)
    rows = [encoded.ids + encoded.ids[-1:] * (longest - len(encoded.ids)) for encoded in batch]
    return torch.tensor(rows), torch.tensor([len(encoded.ids) for encoded in batch])


@contextmanager
def explain_failures(subject: Subject, batch: list[Encoded]) -> Iterator[None]:
    """Says which prompt a numerical failure belongs to."""
    try:
        yield
    except fisher.NumericalError as error:
        prompt = batch[error.prompt].prompt
        where = f"at prompt {prompt.index}, {excerpt(prompt.text, report.EXCERPT)!r}"
        raise UserError(f"{error} {where} (row {prompt.row} of the dataset): try --dtype float32") from error
    except fisher.UnsupportedModelError as error:
        raise UserError(f"no Fisher matrix at {subject.path}: {error}") from error


def linearize(settings: Settings, subject: Subject, batch: list[Encoded]) -> tuple[fisher.Point, int]:
    """The batch's prompts at their last tokens, and how many cotangents to pull back at once."""
    ids, lengths = pad(batch)
    # the block iteration differentiates the backward pass, which fused attention does not allow
    full = settings.top_k_tokens == "all"
    rows = max(1, BACKWARD_ROWS // ids.numel()) if full or ids.shape[1] <= PLAIN_ATTENTION else 1
    use_attention(subject.model, "eager" if full or rows > 1 else "sdpa")
    last_only = settings.bias_positions == "last"
    return fisher.linearize_prompts(subject.model, subject.module, ids, lengths, last_only), rows


def prompts_at_once(settings: Settings, subject: Subject, batch: list[Encoded]) -> int:
    """The whole batch, or as many prompts as leave plain attention room for its tokens x tokens matrices."""
    if settings.top_k_tokens != "all":
        return len(batch)
    config = subject.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    longest = max(len(encoded.ids) for encoded in batch)
    each = MATRICES_KEPT * config.num_hidden_layers * heads * longest**2 * subject.model.dtype.itemsize
    return max(1, min(len(batch), ATTENTION_BYTES // each))


def triplets(settings: Settings, point: fisher.Point, chunks: fisher.Chunks) -> tuple[fisher.Eigenpairs, dict]:
    """The leading eigenpairs of each prompt's F, and columns (prompts,) that say what they leave out."""
    r = settings.num_singular_values
    if settings.top_k_tokens == "all":
        found = leading_eigenpairs(point, r, chunks=chunks)
        eigen, mass = found.eigen, torch.ones_like(found.trace_error[0])
        errors = {"residual": found.residuals[0].amax(-1), "trace_error": found.trace_error[0]}
    else:
        top = fisher.top_k(point, settings.top_k_tokens, chunks)
        eigen, mass, errors = top.eigenpairs(r, allow_zero=True), top.mass, {}
    eigen = fisher.Eigenpairs(*(part[0] for part in eigen))  # of the one module
    return eigen, {"captured_mass": mass, **errors, "trace": eigen.trace, "effective_rank": eigen.effective_rank}


def measure(settings: Settings, subject: Subject, batch: list[Encoded]) -> list[Result]:
    """The results of a batch's prompts. Out of memory, it goes on with half of the batch at a time.

    Raises:
        UserError: a prompt leads to NaN or infinity, or the module does not lead to the predictions.
    """
    start = time.perf_counter()

    def measure_some(which: torch.Tensor) -> list[Result]:
        prompts = [batch[i] for i in which.tolist()]
        with explain_failures(subject, prompts):
            point, rows = linearize(settings, subject, prompts)
            eigen, columns = triplets(settings, point, fisher.Chunks(rows))
        top_probability, top_id = (column.tolist() for column in point.log_probs.exp().max(-1))
        values, vectors = (part.cpu().numpy() for part in eigen[:2])
        columns = {name: column.tolist() for name, column in columns.items()}
        return [
            Result(
                record={
                    "index": encoded.prompt.index,
                    "row": encoded.prompt.row,
                    "prompt": encoded.prompt.text,
                    "tokens": len(encoded.ids),
                    "truncated": encoded.truncated,
                    "top_token": subject.tokenizer.decode([top_id[i]]),
                    "top_probability": top_probability[i],
                    **{name: column[i] for name, column in columns.items()},
                    "singular_values": values[i].tolist(),
                },
                values=values[i],
                vectors=vectors[i],
            )
            for i, encoded in enumerate(prompts)
        ]

    parts = fisher.Chunks(prompts_at_once(settings, subject, batch)).map(measure_some, torch.arange(len(batch)))
    results = list(chain.from_iterable(parts))
    seconds = (time.perf_counter() - start) / len(batch)
    for result in results:
        result.record["seconds"] = seconds
    return results


def check_padding(settings: Settings, subject: Subject, prompts: list[Encoded]) -> None:
    """Compares the shortest prompt beside the longest with itself alone, in a plain forward pass.

    Raises:
        UserError: they differ by more than rounding, so that this model's results would depend on the padding.
    """
    shortest, *_, longest = sorted([*prompts, prompts[0]], key=lambda encoded: len(encoded.ids))
    with explain_failures(subject, [shortest, longest]):
        point, _ = linearize(settings, subject, [shortest, longest])
    with torch.no_grad():
        alone = subject.model(torch.tensor([shortest.ids], device=subject.model.device), use_cache=False)
    log_probs = alone.logits[0, -1].float().log_softmax(-1).to(point.log_probs.device)
    kl = float(fisher.kl_divergence(log_probs, point.log_probs[0]))
    if not kl <= ROUNDING_NATS[subject.model.dtype]:
        name = type(subject.model).__name__
        raise UserError(f"{name} is not supported: its predictions change by {kl:.2g} nats with what is in the batch")


# --- the dataset, shard by shard -----------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A window of the dataset, and what is left to do of it."""

    number: int
    finished: int  # prompts that an earlier run has done
    todo: dict[int, list[Encoded]]  # by number of the batch
    closed: bool = False  # its file is there


def plan(
    settings: Settings, prompts: Iterator[Prompt], tokenizer, longest: int, store: Store, process: Processes
) -> Iterator[Shard]:
    """This process's shards in order, with what an earlier run left of them.

    Shards and batches are a function of the dataset and the settings alone, so that neither the number of
    processes nor an interruption changes a result.
    """
    source = islice(prompts, settings.num_prompts)
    size = SHARD_BATCHES * settings.batch_size
    number = -1
    while window := list(islice(source, size)):
        number += 1
        if number % process.size != process.rank:
            continue
        if store.has_shard(number, window):
            yield Shard(number, len(window), {}, closed=True)
            continue
        encoded = [encode(tokenizer, prompt, longest) for prompt in window]
        batches = plan_batches([len(e.ids) for e in encoded], settings.batch_size)
        todo = {i: [encoded[j] for j in batch] for i, batch in enumerate(batches)}
        for i in [i for i in todo if store.has_batch(number, i, [e.prompt for e in todo[i]])]:
            del todo[i]
        yield Shard(number, len(window) - sum(map(len, todo.values())), todo)


def progress_bar(settings: Settings, process: Processes) -> tqdm:
    size = SHARD_BATCHES * settings.batch_size
    starts = range(process.rank * size, settings.num_prompts, process.size * size)
    mine = sum(min(size, settings.num_prompts - start) for start in starts)
    label = "Fisher matrices" if process.size == 1 else f"Fisher matrices, process 1 of {process.size}"
    return tqdm(total=mine, desc=label, unit="prompt", disable=None if process.first else True)


def compute(settings: Settings, subject: Subject, shards: Iterator[Shard], store: Store, bar: tqdm) -> None:
    """Takes every shard through `measure`. The next one is tokenized, and results are written, meanwhile."""
    pending: deque[Future] = deque()
    tokens, start, checked = 0, time.perf_counter(), False
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead = reader.submit(next, shards, None)
        while (shard := ahead.result()) is not None:
            ahead = reader.submit(next, shards, None)
            bar.update(shard.finished)
            if shard.todo and not checked:
                check_padding(settings, subject, list(chain.from_iterable(shard.todo.values())))
                checked = True
            for number, batch in shard.todo.items():
                results = measure(settings, subject, batch)
                pending.append(writer.submit(store.write_batch, shard.number, number, results))
                while len(pending) > MAX_WAITING:  # raises what a write that failed has raised
                    pending.popleft().result()
                tokens += sum(len(encoded.ids) for encoded in batch)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                bar.update(len(batch))
            if not shard.closed:
                pending.append(writer.submit(store.close_shard, shard.number))
        for write in pending:
            write.result()


# --- the protocol --------------------------------------------------------------------------------


def load_subject(settings: Settings, process: Processes) -> Subject:
    device = settings.device
    if process.size > 1 and device == "auto" and torch.cuda.is_available():
        device = f"cuda:{process.local}"
    lm, tokenizer = load(settings.model_path, settings.dtype, device, settings.trust_remote_code)
    return Subject(lm, tokenizer, *find_module(lm, settings.hook_layer_name))


def clamp_to_model(settings: Settings, subject: Subject, tell: Callable[[str], None]) -> Settings:
    """The settings with no more tokens than the vocabulary has, and no more singular values than F has."""
    k, r, vocabulary = settings.top_k_tokens, settings.num_singular_values, vocabulary_size(subject.model)
    if k != "all" and k > vocabulary:
        tell(f"note: --top-k-tokens {k} is more than the vocabulary: counting all {vocabulary} tokens")
        k = vocabulary
    width = subject.model.get_output_embeddings().weight.shape[1]
    most, of = (width, f"of width {width}") if k == "all" else (k, f"of {k} tokens")
    if r > most:
        tell(f"note: --num-singular-values {r} is more than a matrix {of} has: keeping {most}")
        r = most
    return replace(settings, top_k_tokens=k, num_singular_values=r)


def run(command: Command, process: Processes) -> int:
    settings = command.settings
    tell = print if process.first else lambda text: None
    directory = RunDirectory(settings)
    if process.ask_first(lambda: directory.is_finished(command.overwrite)):
        if process.first:
            directory.clean_up()
        tell(f"{settings.output_dir} is finished: nothing to do (--overwrite starts anew)")
        return 0
    prompts = Prompts(
        settings.dataset, settings.dataset_split, settings.prompt_column, settings.dataset_config, settings.seed
    )
    source = iter(prompts)
    first = next(source, None)  # what is wrong with the dataset is said before the model is loaded
    if first is None:
        raise UserError(f"{prompts.source} has no usable prompt: {prompts.skipped} rows, all empty or no text")

    subject = load_subject(settings, process)
    longest = min(settings.max_length, longest_prompt(subject.model) or settings.max_length)
    environment = describe(subject.model)
    identity = {"hook_layer": subject.path, "model_fingerprint": fingerprint(subject.model)}
    process.ask_first(lambda: directory.begin(identity, environment, command.overwrite))
    tell(model_line(settings.model_path, environment) + f"; hooked at {subject.path}")
    clamped = clamp_to_model(settings, subject, tell)

    with progress_bar(settings, process) as bar:
        shards = plan(settings, chain([first], source), subject.tokenizer, longest, directory.store, process)
        try:
            compute(clamped, subject, shards, directory.store, bar)
        except KeyboardInterrupt:
            bar.close()
            print(
                "Interrupted: finished batches are saved, and the same command goes on with the rest.", file=sys.stderr
            )
            return INTERRUPTED
    process.wait_for_all()
    if process.first:
        tell(directory.finish(SHARD_BATCHES * settings.batch_size, prompts.skipped))
    if prompts.usable < settings.num_prompts:
        tell(f"note: {settings.num_prompts} prompts were asked for, only {prompts.usable} are available")
    tell(f"Written to {settings.output_dir}: {', '.join(FILES)}")
    return 0


def main(command: Command) -> int:
    def run_or_redraw() -> int:
        if command.redraw:
            figures.draw(command.redraw)
            print(f"Drawn in {command.redraw}: {figures.SPECTRA}")
            return 0
        with processes.join() as process:
            return run(command, process)

    advice = "a smaller --max-length or --top-k-tokens, --dtype bfloat16, or a smaller model"
    return exit_code(PROGRAM, run_or_redraw, advice)


if __name__ == "__main__":
    sys.exit(main(from_command_line))
