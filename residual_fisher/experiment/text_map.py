"""The map of a text (--map): the Fisher matrix at every token and chosen layer, as a run of its own, and its files."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
import json
from pathlib import Path
import time

import numpy as np
import torch
from torch import Tensor

import fisher
from residual_fisher.common import drawing
from residual_fisher.common.conversations import Turn, turns_of
from residual_fisher.common.files import document_checksum, json_ready, write_json, write_npz
from residual_fisher.common.options import settings_of
from residual_fisher.common.page import PAGE
from residual_fisher.common.program import UserError, peak_memory, undisturbed
from residual_fisher.common.run import Run, State, short_hash, stamps
from residual_fisher.common.text import duration, excerpt, first_line, model_line, printable, table
from residual_fisher.experiment.lens_audit import lens_for
from residual_fisher.experiment.map_figure import PANELS, map_figure, panel_figure
from residual_fisher.experiment.page import write_map_page
from residual_fisher.experiment.settings import Settings, choose_layers
from residual_fisher.model.lens import has_lens, lens_logits
from residual_fisher.model.loading import (
    decoder_layers,
    describe,
    dtype_advice,
    fingerprint,
    fix_arithmetic,
    load,
    longest_prompt,
    text_config,
)
from residual_fisher.model.passes import devices_of, require_known_tokens, ways_of
from residual_fisher.model.template import render_turns
from residual_fisher.model.words import summary_line, token_writer

RESULTS, ARRAYS, PICTURE = "fisher_map.json", "fisher_map.npz", "fisher_map.png"
FILES = RESULTS, ARRAYS, PICTURE, PAGE
# The settings that a map has, of all those of the experiment; the first ones change its numbers.
IDENTITY = ("model_name", "layers", "max_vocab_subset", "dtype", "lens")
RECORDED = ("map", "chat", *IDENTITY, "device", "trust_remote_code", "output_dir")
UNCHECKED = ("map_config", "environment", "timings", "checksum")  # what the document's checksum leaves out
LENS_TOKENS = 3  # most probable tokens of a lens, kept for each cell
LENS_ROWS = 256  # cells that go through the head at a time
SHOWN = 10  # tokens in the table for the terminal
TRIED = 16  # tokens that a dry run maps


def read_text(source: str) -> str:
    """The text of a file of this name, or `source` itself if there is none.

    Raises:
        UserError: the file cannot be read, or holds no text.
    """
    try:
        if not Path(source).is_file():
            return source
    except OSError:  # too long for a file's name
        return source
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the text {source}: {first_line(error)}") from error
    if not text.strip():
        raise UserError(f"the text {source} is empty")
    return text


def as_read(settings: Settings, tokenizer, text: str) -> tuple[str, list[int]]:
    """What the model reads, and its tokens: the text; with --chat, the conversation that it holds, in the template.

    A text that holds no conversation is a user's turn.

    Raises:
        UserError: the tokenizer has no chat template, or it fails; or a file of JSON holds no conversation.
    """
    if not settings.chat:
        return text, tokenizer(text).input_ids
    if not tokenizer.chat_template:
        raise UserError(f"--chat: {settings.model_name} has no chat template: give the text as the model reads it")
    turns = [turn for turn in turns_of(text) if turn.text]
    if not turns and text != settings.map and Path(settings.map).suffix in (".json", ".jsonl"):
        raise UserError(f"--chat: {settings.map} holds no conversation: a list of turns, each with a role and content")
    rendered = render_turns(tokenizer, turns or [Turn("user", text)])
    return rendered, tokenizer(rendered, add_special_tokens=False).input_ids  # the template has its own special tokens


# --- the run -------------------------------------------------------------------------------------


def run_map(settings: Settings, program: str, files: Sequence[str]) -> int:
    """Maps a text, unless the folder has this map already; or, in a dry run, says what that would take.

    Args:
        program, files: the script, and all files of any of its runs.
    Raises:
        UserError: what was asked for cannot be done.
    """
    text, settings = read_text(settings.map), replace(settings, layers=settings.layers or ("all",))
    given = short_hash(["chat", text] if settings.chat else text)
    asked = {**{name: settings_of(settings)[name] for name in IDENTITY}, "map": given}
    run = Run(settings.folder, program, files, settings.overwrite, settings.dry_run, "text")
    sources = {"data": given, "model": stamps(settings.model_name)}
    with run.locked():
        if run.is_finished(asked, sources, 1):
            return report_finished(run)
        start = time.perf_counter()
        model, tokenizer = load(settings.model_name, settings.dtype, settings.device, settings.trust_remote_code)
        seconds = {"load": time.perf_counter() - start}
        fix_arithmetic(model)
        depth = len(decoder_layers(model))
        settings = replace(settings, layers=choose_layers(settings.layers, depth))
        if settings.lens:
            lens_for(settings.lens, settings.layers, depth, text_config(model).hidden_size)
        environment = describe(model)
        text, ids = as_read(settings, tokenizer, text)
        print(model_line(settings.model_name, environment))
        print(f"{len(ids)} tokens, {len(settings.layers)} of {environment['depth']} layers: {excerpt(text, 60)}")
        require_fitting(model, ids)
        known = fingerprint(model, tokenizer)
        state = run.examine({"settings": asked, "model": known, "text": short_hash(ids)}, sources, 1)
        if state is State.FINISHED:
            return report_finished(run)
        if settings.dry_run:
            return describe_run(settings, run, model, tokenizer, ids)
        document, arrays = measure(settings, model, tokenizer, text, ids, environment, seconds)
        identity = {"model_fingerprint": known, "text_fingerprint": short_hash(ids)}
        document = {"run": {"id": short_hash([identity, asked]), **identity}, **document}
        with undisturbed():
            run.begin()
            document = write_map(run.folder, document, arrays)
            run.finish(1, (RESULTS, ARRAYS))
            draw(run, document)
    print(summary(document))
    print(f"Written to {printable(str(run.folder))}: {', '.join(FILES)}")
    return 0


def require_fitting(model: torch.nn.Module, ids: list[int]) -> None:
    """Raises UserError if the text has no tokens, or more than the model has positions."""
    if not ids:
        raise UserError("the text has no tokens")
    longest = longest_prompt(model)
    if longest and len(ids) > longest:
        raise UserError(f"the text has {len(ids)} tokens, and the model has positions for {longest}: shorten it")


def report_finished(run: Run) -> int:
    document = read_map(run.folder)
    if not run.read_only:
        draw(run, document)
    print(summary(document))
    print(f"{printable(str(run.folder))} is finished: nothing to do (--overwrite starts anew)")
    return 0


def describe_run(settings: Settings, run: Run, model: torch.nn.Module, tokenizer, ids: list[int]) -> int:
    """What a dry run says: it maps the first part of the text twice, the first time to warm up."""
    if run.is_begun():
        print(f"An earlier run in {printable(str(run.folder))} would be replaced.")
    tried = ids[:TRIED]
    for _ in range(2):
        start = time.perf_counter()
        make_map(settings, model, tokenizer, tried)
        seconds = (time.perf_counter() - start) * len(ids) / len(tried)
    print(f"time: about {duration(seconds)}")
    print(f"memory: {peak_memory(devices_of(model))}, with {len(tried)} tokens")
    print("Nothing was written: a dry run.")
    return 0


# --- the numbers ---------------------------------------------------------------------------------


def make_map(settings: Settings, model: torch.nn.Module, tokenizer, ids: list[int]) -> fisher.TextMap:
    """Raises UserError: the model is not supported, or gives NaN or infinity."""
    try:
        require_known_tokens(model, torch.tensor(ids))
        point = fisher.linearize(model, ids, settings.layers)
        fisher.check_prediction(point, partial(fisher.perturb, point, at=point.layers[0]))
        return fisher.map_text(model, tokenizer, ids, settings.layers, settings.max_vocab_subset)
    except fisher.UnsupportedModelError as error:
        raise UserError(f"this model is not supported: {error}") from error
    except (fisher.NumericalError, torch.linalg.LinAlgError) as error:
        raise UserError(f"{first_line(error)}{dtype_advice(model)}") from error


def measure(
    settings: Settings,
    model: torch.nn.Module,
    tokenizer,
    text: str,
    ids: list[int],
    environment: dict,
    seconds: dict[str, float],
) -> tuple[dict, dict[str, np.ndarray]]:
    """The document of a text without its run and checksum, and the arrays."""
    start = time.perf_counter()
    found = make_map(settings, model, tokenizer, ids)
    seconds["map"] = time.perf_counter() - start
    start = time.perf_counter()
    lenses = read_through_lenses(settings, model, found)
    seconds["lens"] = time.perf_counter() - start
    if note := ways_of(model).get("text"):
        print(f"note: {type(model).__name__} is not read in the fastest way, but {printable(note)}")
    config = settings_of(settings)
    document = {
        "map_config": {name: config[name] for name in RECORDED},
        "environment": {**environment, "ways": dict(ways_of(model))},
        "text": text,
        "layers": found.layers,
        "tokens": token_records(found, lenses, cache(token_writer(tokenizer))),
        "timings": seconds,
    }
    return document, arrays_of(found)


def read_through_lenses(
    settings: Settings, model: torch.nn.Module, found: fisher.TextMap
) -> dict[str, dict[int, Tensor]]:
    """The most probable tokens (tokens, n) int64 that each h reads as: by lens, then by the layer's index.

    `lens`: as if h left the last layer. `local_lens`: as if J h did, with J at this very token. `jacobian_lens`, with
    --lens: as if the lens's J h did. There are none if the prediction does not follow from the stream that leaves the
    last layer alone.
    """
    if not has_lens(model):
        return {}

    def read(streams: Tensor) -> Tensor:
        parts = streams.split(LENS_ROWS)
        return torch.cat([fisher.most_probable(lens_logits(model, h), LENS_TOKENS)[1].cpu() for h in parts])

    streams = dict(enumerate(found.activations.unbind(1)))  # (tokens, d) each
    lenses = {"lens": {row: read(h) for row, h in streams.items()}}
    if found.carried.isfinite().all():
        lenses["local_lens"] = {row: read(h) for row, h in enumerate(found.carried.unbind(1))}
    if settings.lens:
        depth, width = len(decoder_layers(model)), found.activations.shape[-1]
        carry = lens_for(settings.lens, settings.layers, depth, width).matrices
        known = [(row, layer) for row, layer in enumerate(found.layers) if layer in carry]
        lenses["jacobian_lens"] = {row: read(streams[row] @ carry[layer].T) for row, layer in known}
    return lenses


def token_records(
    found: fisher.TextMap, lenses: dict[str, dict[int, Tensor]], write: Callable[[int], str]
) -> list[dict]:
    """Of each token: what it is, what is predicted after it, and its cells by layer."""
    norms = found.activations.norm(dim=-1)  # (tokens, layers)
    # what a step of 1% of |h| along v is predicted to cost
    columns = {
        "eigenvalue": found.eigenvalues, "trace": found.trace, "effective_rank": found.effective_rank,
        "activation_norm": norms, "nats": 0.5 * found.eigenvalues * (0.01 * norms) ** 2,
    }  # fmt: skip
    columns = {name: column.tolist() for name, column in columns.items()}
    surprisal, mass, probabilities = found.surprisal.tolist(), found.captured_mass.tolist(), found.top_log_probs.exp()

    def cells(token: int) -> dict[str, dict]:
        words, layers = found.shares.records((token,), write), {}
        for row, layer in enumerate(found.layers):
            layers[str(layer)] = {name: column[token][row] for name, column in columns.items()}
            layers[str(layer)]["tokens"] = words[row]
            for name, ids in lenses.items():
                if row in ids:
                    layers[str(layer)][name] = list(map(write, ids[row][token].tolist()))
        return layers

    records = []
    for token, id_ in enumerate(found.ids.tolist()):
        top = zip(found.top_ids[token].tolist(), probabilities[token].tolist(), strict=True)
        records.append(
            {
                "token": write(id_),
                "id": id_,
                "surprisal": surprisal[token] if token else None,
                "captured_mass": min(mass[token], 1.0),
                "predicted": [{"token": write(one), "id": one, "probability": p} for one, p in top],
                "layers": cells(token),
            }
        )
    return records


# --- files ---------------------------------------------------------------------------------------


def arrays_of(found: fisher.TextMap) -> dict[str, np.ndarray]:
    """The arrays of the NPZ: tokens first, then layers."""
    names = ("eigenvalues", "trace", "effective_rank", "captured_mass", "surprisal", "activations", "ids", "carried")
    arrays = {"eigenvectors": found.vectors.numpy(), **{name: getattr(found, name).numpy() for name in names}}
    return {**arrays, "layers": np.array(found.layers)}


def write_map(folder: Path, document: dict, arrays: dict[str, np.ndarray]) -> dict:
    """Writes both primary files; returns the document as it is read back. Raises UserError: they cannot be written."""
    write_npz(folder / ARRAYS, {**arrays, "run": np.array(document["run"]["id"])})
    document = json_ready(document)
    document["checksum"] = document_checksum(document, UNCHECKED)
    write_json(folder / RESULTS, document)
    return document


def read_map(folder: Path) -> dict:
    """The contents of fisher_map.json. Raises UserError: it is missing, damaged, or not of this script."""
    try:
        document = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document["checksum"] != document_checksum(document, UNCHECKED):
            raise ValueError("it is damaged")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise UserError(f"no readable {RESULTS} in {folder}: {first_line(error)}") from error
    return document


def draw(run: Run, document: dict) -> None:
    run.derive([PICTURE], document["checksum"], lambda: draw_map(run.folder, document))
    run.derive([PAGE], document["checksum"], lambda: write_map_page(run.folder, document))


def draw_map(folder: Path, document: dict, kind: str = "png") -> None:
    drawing.save(folder, {PICTURE: lambda: map_figure(document)}, kind)


def redraw_map(folder: Path, kind: str, panel: str | None, layers: Sequence | None) -> int:
    """Makes the picture and the page of a map again; or draws one panel into a file of its own.

    Raises:
        UserError: there is no such panel or layer, or a file cannot be written.
    """
    document = read_map(folder)
    if panel:
        drawn = [draw_map_panel(folder, document, panel, layers, kind)]
    else:
        draw_map(folder, document, kind)
        write_map_page(folder, document)
        drawn = [drawing.of_kind(PICTURE, kind), PAGE]
    print(f"Drawn in {printable(str(folder))}: {', '.join(drawn)}")
    return 0


def draw_map_panel(folder: Path, document: dict, name: str, layers: Sequence | None, kind: str) -> str:
    """Draws one panel; returns the file's name."""
    drawing.known_panel(PANELS, name)
    if layers is not None and name != "grid":
        raise UserError(f"--layers has no effect on the panel {name}: it has no layers")
    part = [] if layers is None else ["layers", *map(str, layers)]
    draw = partial(panel_figure, document, name, layers)
    return drawing.save_panel(folder, PICTURE, [name, *part], draw, kind)


# --- the terminal --------------------------------------------------------------------------------


def summary(document: dict) -> str:
    """The tokens after which the prediction is most sensitive, each at its most sensitive layer, and the words of v."""
    rows = []
    for place, record in enumerate(document["tokens"]):
        layer, cell = max(record["layers"].items(), key=lambda item: item[1]["nats"])
        predicted = record["predicted"][0]
        guess = f"{predicted['token']} {predicted['probability']:.2f}"
        if place:  # the first token's activation has a length of its own
            words = summary_line(cell["tokens"], 2)
            rows.append((cell["nats"], [str(place), record["token"], guess, layer, f"{cell['nats']:.2g}", words]))
    rows = [row for _, row in sorted(rows, key=lambda row: -row[0])[:SHOWN]]
    if not rows:
        return "A single token: there is no other to compare it with."
    longest = max(len(row[-1]) for row in rows)
    note = f"The {len(rows)} most sensitive predictions, each where it is most so: nats that 1% of |h| along v costs"
    aligned = [[*cells, words.ljust(longest)] for *cells, words in rows]
    lines = table(["", "after", "predicted", "layer", "nats", "loses ← → gains"], aligned)
    return f"{note}\n{lines}"
