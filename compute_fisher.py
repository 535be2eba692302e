"""Fisher information matrices of a dataset's prompts, each compressed to its top singular triplets.

For every prompt, a zero bias is added to the residual stream at one layer, at every token. F is the Fisher
information matrix of the next-token distribution at the prompt's end with respect to that bias: perturbing
the whole residual stream by delta changes the prediction by KL ~ 1/2 delta^T F delta nats. Prompts whose
F is unlike the others' are prompts on which the model behaves unlike itself.

    python compute_fisher.py
    python compute_fisher.py --config configs/llama_8b.yaml --output-dir results
    python compute_fisher.py --dataset-name suspicious.jsonl --reference fisher_results --output-dir suspicious
    torchrun --nproc-per-node 8 compute_fisher.py --config configs/lmsys_1b.yaml

Writes fisher_matrices_compressed.npz, prompts.jsonl, metadata.yaml, fisher_spectra.png and report.html to the
output directory. The same command resumes a stopped run, and with more prompts extends a finished one.
"""

from residual_fisher.common.program import INTERRUPTED, before_imports

if __name__ == "__main__":  # Ctrl-C may come during the imports below, which take seconds
    before_imports()

import sys

from residual_fisher.common.program import (
    FOUND,
    SOME_FAILED,
    UserError,
    end_with_error,
    exit_code,
    go_offline_without_hub,
)
from residual_fisher.common.sources import names_of
from residual_fisher.pipeline.settings import Settings, parse

PROGRAM = "compute_fisher.py"

if __name__ == "__main__":  # before the slow imports: --help need not wait for torch
    try:
        from_command_line = parse(sys.argv[1:])
        go_offline_without_hub(from_command_line.model_path, *names_of(from_command_line.dataset))
    except UserError as error:
        sys.exit(end_with_error(PROGRAM, error))

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, islice
import math
from pathlib import Path
import time

import torch
from tqdm import tqdm

from residual_fisher.common.archives import Item
from residual_fisher.common.options import identity_of, settings_of
from residual_fisher.common.page import PAGE
from residual_fisher.common.progress import LogLines, progress
from residual_fisher.common.run import Run, State, checksum, read_manifest, sources_of
from residual_fisher.common.text import duration, excerpt, model_line, printable
from residual_fisher.model.loading import (
    describe,
    dtype_advice,
    find_module,
    fingerprint,
    fix_arithmetic,
    load,
    longest_prompt,
    vocabulary_size,
)
from residual_fisher.model.passes import ways_of
from residual_fisher.pipeline import figures, findings, matrices, processes, report
from residual_fisher.pipeline.batches import Subject, check_once, measure, try_first, write_tokens
from residual_fisher.pipeline.comparison import compare_runs
from residual_fisher.pipeline.derived import (
    FINDINGS,
    METADATA,
    PROMPTS,
    conclude,
    draw,
    findings_of,
    made_from_scores,
    score,
    scored_records,
    scoring_of,
    write_page,
)
from residual_fisher.pipeline.estimate import describe_run, seconds_to_explain, tell_left_out, tell_too_few
from residual_fisher.pipeline.processes import Processes
from residual_fisher.pipeline.prompts import Prompt, Prompts
from residual_fisher.pipeline.reference import Reference
from residual_fisher.pipeline.windows import Failures, Pace, Pipeline, plan

FILES = (matrices.ARRAYS, PROMPTS, METADATA, figures.SPECTRA, PAGE)
MAX_WAITING = 2  # batches that may wait to be written


# --- 1. the dataset and the model ----------------------------------------------------------------


def open_dataset(settings: Settings) -> tuple[Prompts, Iterator[Prompt], Prompt]:
    """The dataset, the prompts to take one by one, and the first: what is wrong shows before the model is loaded."""
    prompts = Prompts(
        settings.dataset,
        settings.dataset_split,
        settings.prompt_column,
        settings.dataset_config,
        settings.seed,
        settings.turns,
        settings.system,
        raw=settings.chat_template == "none",
    )
    wanted = None if settings.num_prompts == "all" else settings.num_prompts
    source = iter(prompts)
    first = next(source)
    return prompts, islice(chain([first], source), wanted), first


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


def prepare(settings: Settings, first: Prompt, process: Processes, tell: Callable[[str], None]) -> Pipeline:
    """Loads the model, and tries the first prompt.

    Raises:
        UserError: the settings do not fit the model, or the model is not supported.
    """
    device = own_device(settings.device, process)
    model, tokenizer = load(settings.model_path, settings.dtype, device, settings.trust_remote_code)
    fix_arithmetic(model)
    if settings.chat_template == "none":
        tokenizer.chat_template = None
    subject = Subject(model, tokenizer, *find_module(model, settings.hook_layer_name))
    positions = longest_prompt(model) or math.inf  # an answer takes some of them
    longest = min(settings.max_length, max(1, positions - settings.answer_tokens + 1))
    asked, settings = identity_of(settings), clamp_to_model(settings, subject, tell)
    try_first(settings, subject, first, longest)
    identity = {"settings": asked, "hook_layer": subject.path, "model": fingerprint(model, tokenizer)}
    return Pipeline(settings, subject, longest, describe(model), identity)


def clamp_to_model(settings: Settings, subject: Subject, tell: Callable[[str], None]) -> Settings:
    """The settings with no more tokens than the vocabulary has, and no more singular values than F has."""
    k, r, vocabulary = settings.top_k_tokens, settings.num_singular_values, vocabulary_size(subject.model)
    if k != "all" and k > vocabulary:
        tell(f"note: --top-k-tokens {k} is more than the vocabulary: counting all {vocabulary} tokens")
        k = vocabulary
    width = subject.model.get_output_embeddings().weight.shape[1]
    tokens = vocabulary if k == "all" else k
    most, of = (width, f"of width {width}") if k == "all" and width < tokens else (tokens, f"of {tokens} tokens")
    if r > most:
        tell(f"note: --num-singular-values {r} is more than a matrix {of} has: keeping {most}")
        r = most
    return replace(settings, top_k_tokens=k, num_singular_values=r)


# --- 2. windows and batches of the dataset, 3. Fisher matrices, 4. their singular triplets -------


def compute(pipeline: Pipeline, source: Iterator[Prompt], run: Run, process: Processes, bar: tqdm | LogLines) -> None:
    """Takes the windows of this process through `measure`, and keeps every batch as soon as it is finished.

    The next window is tokenized meanwhile, and items are completed and written.
    """
    settings, subject = pipeline.settings, pipeline.subject
    windows = plan(pipeline, source, run, process)
    pending: deque[Future] = deque()
    checked, pace = set(), Pace(settings, process.size)
    failures = Failures(dtype_advice(subject.model))

    def keep(items: list[Item]) -> None:
        run.append(write_tokens(subject, items))

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead = reader.submit(next, windows, None)
        while (window := ahead.result()) is not None:
            ahead = reader.submit(next, windows, None)
            bar.update(process.count(window.finished) - bar.n)
            pace.plan(window)
            for batch in window.batches:
                check_once(settings, subject, batch, checked)
                items = measure(settings, subject, batch)
                pending.append(writer.submit(keep, items))
                while len(pending) > MAX_WAITING:  # raises what a write that failed has raised
                    pending.popleft().result()
                failures.count(items)
                pace.finish(batch)
                bar.set_postfix_str(pace.told(), refresh=False)
                bar.update(process.count(len(batch)) - bar.n)
            pending.append(writer.submit(run.pack, window.numbers))
        for write in pending:
            write.result()


# --- the run -------------------------------------------------------------------------------------


def run_pipeline(settings: Settings, process: Processes) -> int:
    """Computes what is missing of a run; or, in a dry run, says what that would take, and writes nothing.

    Of several processes the first has the folder locked, and concludes the run. In a dry run it works alone.
    """
    processes_in_all = process.size
    if settings.dry_run:
        settings = replace(settings, device=own_device(settings.device, process))
        if not process.first:
            return 0
        process = Processes()
    if settings.fail_on_finding and not settings.explain:
        raise UserError("--fail-on-finding needs --explain: without it nothing is looked for")
    files = (*FILES, FINDINGS, matrices.LINES, findings.JOURNAL)
    run = Run(Path(settings.output_dir), PROGRAM, files, settings.overwrite, settings.dry_run, "prompts")
    against: Reference | None = None
    with ExitStack() as stack:

        def open_and_look() -> bool:
            nonlocal against
            stack.enter_context(run.locked())
            against = Reference.asked_for(settings)
            sources = sources_of(settings.dataset, settings.dataset_split, settings.model_path)
            finished = run.is_finished(identity_of(settings), sources, settings.num_prompts)
            return finished and is_explained(run, settings, against)

        if process.ask_first(open_and_look):
            return report_finished(run, settings, against) if process.first else 0
        prompts, source, first = open_dataset(settings)
        start = time.perf_counter()
        pipeline = prepare(settings, first, process, print if process.first else lambda line: None)
        load_seconds = time.perf_counter() - start
        if process.ask_first(lambda: examine(run, settings, pipeline, against) is State.FINISHED):
            return report_finished(run, settings, against, pipeline) if process.first else 0
        if process.first:
            print(f"{model_line(settings.model_path, pipeline.environment)}; hooked at {pipeline.subject.path}")
        if settings.dry_run:
            return describe_run(pipeline, prompts, source, run, load_seconds, processes_in_all)
        process.ask_first(run.begin)
        if not process.first:
            run.join()
        try:
            with progress_bar(settings, process) as bar:
                compute(pipeline, source, run, process, bar)
            if not process.leave():
                return 0
            tell_left_out(prompts, pipeline)
            tell_too_few(settings, prompts.usable)
            primary = matrices.merge(run, prompts.usable)
            columns = report.columns_of(record for _, record in run.all_records())
            environment = {**pipeline.environment, "ways": ways_of(pipeline.subject.model)}
            statistics = {**report.summarize(columns, prompts.skipped), "left_out": dict(+prompts.left_out)}
            run.finish(prompts.usable, primary, environment=environment, statistics=statistics)
            derive(run, settings, against, pipeline)
        except KeyboardInterrupt:
            print("Interrupted: finished batches are saved; the same command resumes the run.", file=sys.stderr)
            return INTERRUPTED
        print(table_of(run, settings))
        written = (*FILES, *[FINDINGS] * (run.folder / FINDINGS).is_file())
        print(f"Written to {printable(str(run.folder))}: {', '.join(written)}")
        return code_of(run, settings)


def examine(run: Run, settings: Settings, pipeline: Pipeline, against: Reference | None) -> State:
    """How far the run has come.

    Raises:
        UserError: the folder holds another run, and may not be overwritten; or the reference does not fit.
    """
    if against:
        against.require_same_kind(pipeline.identity, pipeline.environment)
    notes = {"config": settings_of(settings), "environment": pipeline.environment}
    split = partial(matrices.split, run.folder)
    sources = sources_of(settings.dataset, settings.dataset_split, settings.model_path)
    state = run.examine(pipeline.identity, sources, settings.num_prompts, split, notes)
    if state is State.STARTED and settings.num_prompts != "all" and run.last() >= settings.num_prompts:
        raise UserError(
            f"{run.folder} holds an unfinished run of more prompts, {run.last() + 1} at least: ask for as many, or "
            "--overwrite starts anew"
        )
    return state


def progress_bar(settings: Settings, process: Processes) -> tqdm | LogLines:
    """Of all processes' prompts, shown by the first."""
    total = None if settings.num_prompts == "all" else settings.num_prompts
    return progress(total, "Fisher matrices", "prompt", shown=process.first, even=False)


def is_scored(run: Run, against: Reference | None) -> bool:
    return run.is_derived([PROMPTS], made_from_scores(run, scoring_of(against)))


def is_explained(run: Run, settings: Settings, against: Reference | None) -> bool:
    """Whether no prompts are left to be explained, which takes the model."""
    if not settings.explain:
        return True
    return is_scored(run, against) and run.is_derived([FINDINGS], findings.made_from(run, settings.explain))


def derive(run: Run, settings: Settings, against: Reference | None, pipeline: Pipeline | None) -> list[str]:
    """Makes the derived files that are missing, damaged or of something else; returns those but for the metadata.

    Args:
        pipeline: not needed if `is_explained`.
    """
    made = score(run, against)
    if not is_explained(run, settings, against):
        chat = findings.Chat(pipeline.subject, pipeline.longest)
        made += findings.explain_run(run, settings.explain, against, chat)
    return made + conclude(run, against, settings.false_alarms)


def table_of(run: Run, settings: Settings) -> str:
    records, statistics = partial(scored_records, run.folder), run.manifest["notes"]["statistics"]
    return report.final_table(records, statistics, settings, findings_of(run.folder))


def code_of(run: Run, settings: Settings) -> int:
    if settings.fail_on_finding and (findings_of(run.folder) or {}).get("findings"):
        return FOUND
    return SOME_FAILED if run.manifest["notes"]["statistics"]["failed_prompts"] else 0


def report_finished(run: Run, settings: Settings, against: Reference | None, pipeline: Pipeline | None = None) -> int:
    """Makes what is missing of a run whose Fisher matrices are all computed, and says so."""
    name = printable(settings.output_dir)
    done = {PROMPTS: "its prompts were scored anew", FINDINGS: "those that stand out were explained"}
    shown = {figures.SPECTRA: "its picture was drawn anew", PAGE: "its page was made anew"}
    if run.read_only and not is_scored(run, against):
        print(f"{name} is finished: only its prompts would be scored anew")
    elif run.read_only and not is_explained(run, settings, against):
        prompts = [*map(findings.prompt_of, findings.outstanding(run.folder, settings.explain))]
        chat = findings.Chat(pipeline.subject, pipeline.longest)
        least, most = map(duration, seconds_to_explain(chat, prompts, len(prompts)))
        print(f"{name} is finished: only the prompts that stand out would be explained, in {least} to {most}")
    elif not run.read_only and (made := derive(run, settings, against, pipeline)):
        print(table_of(run, settings))
        what = " and ".join([done[file] for file in made if file in done] or [shown[file] for file in made])
        print(f"{name} was finished: {what}")
    else:
        if not run.read_only:
            print(table_of(run, settings))
        print(f"{name} is finished: nothing to do (--overwrite starts anew)")
    return code_of(run, settings)


def redraw(folder: Path, false_alarms: float, kind: str, panel: str | None = None) -> int:
    """Makes the picture and the page of the records in a folder again; or draws one panel into a file of its own."""
    try:
        drawn = [draw(folder, false_alarms, kind, panel)]
        if panel is None:
            write_page(folder, false_alarms)
            drawn.append(PAGE)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        manifest = read_manifest(folder)
        if manifest and manifest["derived"].get(PROMPTS, {}).get("checksum") == checksum(folder / PROMPTS):
            raise  # it is as this program has written it
        about = f"the command that made it makes it again ({excerpt(repr(error), 80)})"
        raise UserError(f"no readable {PROMPTS} in {folder}: {about}") from error
    print(f"Drawn in {printable(str(folder))}: {', '.join(drawn)}")
    return 0


def main(settings: Settings) -> int:
    advice = "a smaller --max-length or --top-k-tokens, --dtype bfloat16, or a smaller model"

    def task() -> int:
        if settings.redraw:
            return redraw(Path(settings.redraw), settings.false_alarms, settings.format, settings.panel)
        if settings.compare:
            return compare_runs(settings.compare, settings.comparison_folder)
        return run_pipeline(settings, processes.join())

    return exit_code(PROGRAM, task, advice)


if __name__ == "__main__":
    sys.exit(main(from_command_line))
