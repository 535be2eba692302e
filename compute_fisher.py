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

from common.console import INTERRUPTED, before_imports

if __name__ == "__main__":  # Ctrl-C may come during the imports below, which take seconds
    before_imports()

import sys

from common.command_line import (
    UserError,
    end_with_error,
    exit_code,
    model_line,
    printable,
    settle_network,
)
from pipeline.settings import Command, Settings, parse

PROGRAM = "compute_fisher.py"

if __name__ == "__main__":  # before the slow ones: --help need not wait for torch
    try:
        from_command_line = parse(sys.argv[1:])
        settle_network(from_command_line.settings.model_path, from_command_line.settings.dataset)
    except UserError as error:
        sys.exit(end_with_error(PROGRAM, error))

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
import time

import numpy as np
import torch
from tqdm import tqdm

from common.command_line import first_line
from common.failures import SOME_FAILED, too_many
from common.lock import lock_directory
import fisher
from model.loading import (
    describe,
    dtype_advice,
    find_module,
    fingerprint,
    load,
    longest_prompt,
    rotation_change,
    vocabulary_size,
)
from model.passes import (
    add_at_last,
    differentiated_twice,
    edit_stream,
    hooked,
    last_logits,
    require_causal,
    stream_width,
    use_attention,
)
from pipeline import figures, processes, report
from pipeline.block_lanczos import leading_eigenpairs
from pipeline.processes import Processes
from pipeline.prompts import Encoded, Prompt, Prompts, check_template, encode, plan_batches
from pipeline.run_directory import FILES, RunDirectory
from pipeline.store import PROMPTS, Result, Store

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
    """Turns failures of a whole batch into a line."""
    try:
        yield
    except (fisher.NumericalError, torch.linalg.LinAlgError) as error:
        first, last = batch[0].prompt.index, batch[-1].prompt.index
        where = f"in the batch of prompts {first} to {last}"
        raise UserError(f"{first_line(error)} {where}{dtype_advice(subject.model)}") from error
    except fisher.UnsupportedModelError as error:
        raise UserError(f"no Fisher matrix at {subject.path}: {error}") from error


def attention_for(settings: Settings, batch: list[Encoded]) -> tuple[str, int]:
    """The kind of attention a batch runs with, and how many cotangents to pull back at once."""
    longest = max(len(encoded.ids) for encoded in batch)
    rows = max(1, BACKWARD_ROWS // (len(batch) * longest))
    if settings.top_k_tokens == "all":  # the block iteration differentiates the backward pass: no fused attention
        return "eager", rows
    return ("eager", rows) if longest <= PLAIN_ATTENTION and rows > 1 else ("sdpa", 1)


def linearize(settings: Settings, subject: Subject, batch: list[Encoded]) -> tuple[fisher.Point, int]:
    """The batch's prompts at their last tokens, and how many cotangents to pull back at once."""
    kind, rows = attention_for(settings, batch)
    use_attention(subject.model, kind)
    last_only = settings.bias_positions == "last"
    return fisher.linearize_prompts(subject.model, subject.module, *pad(batch), last_only), rows


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
        with differentiated_twice():
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

    A prompt that leads to NaN, infinity or no convergence is taken out of the batch and recorded as failed.

    Raises:
        UserError: the module does not lead to the predictions, or an eigensolver failed.
    """
    start = time.perf_counter()

    def measure_some(which: torch.Tensor) -> list[Result]:
        prompts = [batch[i] for i in which.tolist()]
        try:
            point, rows = linearize(settings, subject, prompts)
            eigen, columns = triplets(settings, point, fisher.Chunks(rows))
        except fisher.NumericalError as error:
            if error.prompt is None:
                raise
            others = which[torch.arange(len(which)) != error.prompt]
            results = measure_some(others) if len(others) else []
            results.insert(error.prompt, without_matrix(settings, subject, prompts[error.prompt], str(error)))
            return results
        top_probability, top_id = (column.tolist() for column in point.log_probs.exp().max(-1))
        values, vectors = (part.cpu().numpy() for part in eigen[:2])
        columns = {name: column.tolist() for name, column in columns.items()}
        return [
            Result(
                record={
                    **describe_prompt(encoded),
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

    with explain_failures(subject, batch):
        parts = fisher.Chunks(prompts_at_once(settings, subject, batch)).map(measure_some, torch.arange(len(batch)))
    results = list(chain.from_iterable(parts))
    seconds = (time.perf_counter() - start) / len(batch)
    for result in results:
        result.record["seconds"] = seconds
    return results


def describe_prompt(encoded: Encoded) -> dict:
    return {
        "index": encoded.prompt.index,
        "row": encoded.prompt.row,
        "prompt": encoded.prompt.text,
        "tokens": len(encoded.ids),
        "truncated": encoded.truncated,
    }


def without_matrix(settings: Settings, subject: Subject, encoded: Encoded, reason: str) -> Result:
    """The result of a prompt that failed: why, and zeros."""
    r, width = settings.num_singular_values, stream_width(subject.model, subject.module)
    zeros = dict.fromkeys(("top_probability", "captured_mass", "trace", "effective_rank"), 0.0)
    record = {**describe_prompt(encoded), "failed": reason, "top_token": "", **zeros, "singular_values": [0.0] * r}
    return Result(record, np.zeros(r, np.float32), np.zeros((r, width), np.float32))


def check_padding(subject: Subject, batch: list[Encoded]) -> None:
    """Runs the shortest and the longest prompt of a batch, without their last tokens, with two kinds of padding.

    Raises:
        UserError: the logits differ, so that this model's results would depend on what else is in the batch.
    """
    by_length = sorted(batch, key=lambda encoded: len(encoded.ids))
    ids, lengths = pad([by_length[0], by_length[-1]])
    ids = ids if ids.shape[1] > 1 else ids.expand(-1, 2)
    try:
        require_causal(subject.model, ids, (lengths - 1).clamp(min=1))
    except fisher.UnsupportedModelError as error:
        raise UserError(f"{type(subject.model).__name__} is not supported: {error}") from error


# --- the dataset, shard by shard -----------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A window of the dataset, and what is left to do of it."""

    number: int
    prompts: list[int]  # numbers of all its prompts
    todo: dict[int, list[Encoded]]  # by number of the batch
    closed: bool = False  # its file is there


def plan(
    settings: Settings, prompts: Iterator[Prompt], subject: Subject, longest: int, store: Store, process: Processes
) -> Iterator[Shard]:
    """This process's shards in order, with what an earlier run left of them.

    Shards and batches are a function of the dataset and the settings alone, so that neither the number of
    processes nor an interruption changes a result.

    Raises:
        UserError: the dataset is not the one of the earlier run.
    """
    size = SHARD_BATCHES * settings.batch_size
    number = 0
    while window := list(islice(prompts, size)):
        if number % process.size == process.rank:
            yield plan_shard(settings, number, window, subject, longest, store)
        number += 1
    store.require_no_more_than(number)


def plan_shard(
    settings: Settings, number: int, window: list[Prompt], subject: Subject, longest: int, store: Store
) -> Shard:
    numbers = [prompt.index for prompt in window]
    if store.has_shard(number, window):
        return Shard(number, numbers, {}, closed=True)
    encoded = [encode(subject.tokenizer, prompt, longest) for prompt in window]
    # a model that turns its positions in another way for long batches has no batch of both kinds
    change = rotation_change(subject.model)
    batches = []
    for kind in ([e for e in encoded if len(e.ids) > change], [e for e in encoded if len(e.ids) <= change]):
        batches += [[kind[j] for j in batch] for batch in plan_batches([len(e.ids) for e in kind], settings.batch_size)]
    todo = dict(enumerate(batches))
    for i in [i for i in todo if store.has_batch(number, i, [e.prompt for e in todo[i]])]:
        del todo[i]
    return Shard(number, numbers, todo)


def progress_bar(settings: Settings, process: Processes) -> tqdm:
    mine = None
    if settings.num_prompts != "all":
        size = SHARD_BATCHES * settings.batch_size
        full, rest = divmod(settings.num_prompts, size)
        mine = size * len(range(process.rank, full, process.size)) + rest * (full % process.size == process.rank)
    label = "Fisher matrices" if process.size == 1 else f"Fisher matrices, process 1 of {process.size}"
    return tqdm(total=mine, desc=label, unit="prompt", disable=None if process.first else True)


class Failures:
    """How many of this process's prompts have failed."""

    def __init__(self, advice: str):
        self.seen, self.failed, self.advice = 0, 0, advice

    def count(self, results: list[Result]) -> None:
        """Raises UserError: too many have."""
        reasons = [result.record["failed"] for result in results if "failed" in result.record]
        self.seen, self.failed = self.seen + len(results), self.failed + len(reasons)
        if reasons and too_many(self.failed, self.seen):
            raise UserError(f"{self.failed} of the first {self.seen} prompts failed: {reasons[-1]}{self.advice}")


def compute(settings: Settings, subject: Subject, shards: Iterator[Shard], store: Store, bar: tqdm) -> None:
    """Takes every shard through `measure`. The next one is tokenized, and results are written, meanwhile."""
    pending: deque[Future] = deque()
    tokens, start, checked = 0, time.perf_counter(), set()
    failures = Failures(dtype_advice(subject.model))
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead = reader.submit(next, shards, None)
        while (shard := ahead.result()) is not None:
            ahead = reader.submit(next, shards, None)
            bar.update(len(shard.prompts) - sum(map(len, shard.todo.values())))
            for number, batch in shard.todo.items():
                kind = attention_for(settings, batch)[0]
                if kind not in checked:
                    use_attention(subject.model, kind)
                    with explain_failures(subject, batch):
                        check_padding(subject, batch)
                    checked.add(kind)
                results = measure(settings, subject, batch)
                pending.append(writer.submit(store.write_batch, shard.number, number, results))
                while len(pending) > MAX_WAITING:  # raises what a write that failed has raised
                    pending.popleft().result()
                failures.count(results)
                tokens += sum(len(encoded.ids) for encoded in batch)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                bar.update(len(batch))
            if not shard.closed:
                pending.append(writer.submit(store.close_shard, shard.number, shard.prompts))
        for write in pending:
            write.result()


# --- the protocol --------------------------------------------------------------------------------


def own_device(device: str, process: Processes) -> str:
    """The device asked for; of several processes that ask for a GPU without its number, each has its own.

    Raises:
        UserError: there are not enough.
    """
    wanted = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if process.size == 1 or not wanted:
        return device
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return device  # which is not available: `load` says so
    if process.local >= gpus:
        without = f"process {process.rank + 1} of {process.size} has no GPU of its own"
        raise UserError(f"{without}: this machine has {gpus}, so start torchrun with --nproc-per-node {gpus}")
    return f"cuda:{process.local}"


def load_subject(settings: Settings, process: Processes) -> Subject:
    device = own_device(settings.device, process)
    model, tokenizer = load(settings.model_path, settings.dtype, device, settings.trust_remote_code)
    return Subject(model, tokenizer, *find_module(model, settings.hook_layer_name))


def try_first(settings: Settings, subject: Subject, first: Prompt, longest: int) -> None:
    """Takes the first prompt to its last token, so that what is wrong for all prompts is found before anything else.

    Raises:
        UserError: the template leaves no room or leaves out the text, the module does not lead to the predictions, or
            F does not predict them.
    """
    check_template(subject.tokenizer)
    batch = [encode(subject.tokenizer, first, longest)]

    def moved(deltas: torch.Tensor) -> torch.Tensor:
        def add(h: torch.Tensor) -> torch.Tensor:
            here = deltas[:, None].to(h)
            return add_at_last(h, here) if settings.bias_positions == "last" else h + here

        with hooked((subject.module.register_forward_hook, edit_stream(add))):
            return last_logits(subject.model, *pad(batch * len(deltas)))

    try:
        point, rows = linearize(settings, subject, batch)
        fisher.check_prediction(point, moved, fisher.Chunks(rows))
    except fisher.NumericalError:
        return  # it will be recorded as failed
    except fisher.UnsupportedModelError as error:
        raise UserError(f"no Fisher matrix at {subject.path}: {error}") from error


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
    done = f"{printable(settings.output_dir)} is finished: nothing to do (--overwrite starts anew)"
    wanted = None if settings.num_prompts == "all" else settings.num_prompts
    with ExitStack() as stack:
        process.ask_first(lambda: stack.enter_context(lock_directory(directory.path)))
        if process.ask_first(lambda: directory.is_finished(command.overwrite)):
            if process.first:
                directory.clean_up()
            tell(done)
            return 0
        prompts = Prompts(
            settings.dataset, settings.dataset_split, settings.prompt_column, settings.dataset_config, settings.seed
        )
        source = iter(prompts)
        first = next(source)  # what is wrong with the dataset is said before the model is loaded

        subject = load_subject(settings, process)
        longest = min(settings.max_length, longest_prompt(subject.model) or settings.max_length)
        clamped = clamp_to_model(settings, subject, tell)
        try_first(clamped, subject, first, longest)
        environment = describe(subject.model)
        identity = {"hook_layer": subject.path, "model_fingerprint": fingerprint(subject.model, subject.tokenizer)}
        if process.ask_first(lambda: directory.begin(identity, environment, command.overwrite)):
            tell(done)
            return 0
        tell(model_line(settings.model_path, environment) + f"; hooked at {subject.path}")

        try:
            with progress_bar(settings, process) as bar:
                source = islice(chain([first], source), wanted)
                shards = plan(settings, source, subject, longest, directory.store, process)
                compute(clamped, subject, shards, directory.store, bar)
            process.wait_for_all()
            count = min(prompts.usable, wanted or prompts.usable)
            if wanted and count < wanted:
                tell(f"note: {wanted} prompts were asked for, only {count} are available")
            return finish(directory, count, prompts.skipped) if process.first else 0
        except KeyboardInterrupt:
            print("Interrupted: finished batches are saved; the same command does the rest.", file=sys.stderr)
            return INTERRUPTED


def finish(directory: RunDirectory, count: int, skipped: int) -> int:
    """Makes the final files, and says what is in them; returns the exit code."""
    statistics = directory.finish(count, SHARD_BATCHES * directory.settings.batch_size, skipped)
    print(report.final_table(directory.path / PROMPTS, statistics))
    print(f"Written to {printable(str(directory.path))}: {', '.join(FILES)}")
    return SOME_FAILED if statistics["failed_prompts"] else 0


def main(command: Command) -> int:
    def run_or_redraw() -> int:
        if command.redraw:
            figures.draw(command.redraw)
            print(f"Drawn in {printable(str(command.redraw))}: {figures.SPECTRA}")
            return 0
        with processes.join() as process:
            return run(command, process)

    advice = "a smaller --max-length or --top-k-tokens, --dtype bfloat16, or a smaller model"
    return exit_code(PROGRAM, run_or_redraw, advice)


if __name__ == "__main__":
    sys.exit(main(from_command_line))
