"""Which runs of the experiment are one: what counts of their options, and what a run has of what is asked for."""

from dataclasses import replace

from residual_fisher.common.archives import readable_records
from residual_fisher.common.options import identity_of, settings_of
from residual_fisher.common.program import UserError
from residual_fisher.common.run import ANEW, Run, read_back, read_manifest, sources_of, stamps
from residual_fisher.experiment.records import read_results
from residual_fisher.experiment.settings import Settings, choose_layers


def identity_settings(settings: Settings) -> dict:
    """The options that count. More sentences extend a run, but a single one has no other to be compared with."""
    found = identity_of(replace(settings, scale_unit=settings.unit))
    found["num_sentences"] = 1 if settings.wanted == 1 else "several"
    return {**found, "prompt": "given"} if settings.prompt else found


def identity_in(run: Run, settings: Settings) -> dict:
    """`identity_settings`, but with the layers of the run in the folder: more may be added. And if a single sentence
    may be one of those that it has finished, also with its number of them.
    """
    found = identity_settings(settings)
    then = run.manifest["identity"]["settings"] if run.manifest else {}
    if "num_sentences" not in then:  # it is none, or a map's
        return found
    several = run.manifest["complete"] and then["num_sentences"] == "several"
    return {**found, "layers": then["layers"], **({"num_sentences": "several"} if several else {})}


def sources_and_goal(settings: Settings) -> tuple[dict, int | list[str]]:
    """What shows that model and data are as they were, and how many sentences or which prompts are wanted."""
    if settings.prompt:
        return {"data": None, "model": stamps(settings.model_name)}, list(settings.prompt)
    return sources_of(settings.data, settings.data_split, settings.model_name), settings.num_sentences


def as_in_run(run: Run, settings: Settings) -> Settings:
    """The settings, with the layers of the finished run in the folder if all that are asked for are among them."""
    if run.overwrite or not (run.manifest and run.manifest["complete"]):
        return settings
    then = run.manifest["identity"]["settings"].get("layers")  # as they were asked for
    if then == settings_of(settings)["layers"]:
        return settings
    try:
        depth = read_results(run.folder)["environment"]["depth"]
        among = set(choose_layers(settings.layers, depth)) <= set(choose_layers(then, depth))
    except (UserError, LookupError, TypeError):  # to be computed again, refused, or a map's
        return settings
    return replace(settings, layers=then and tuple(then)) if among else settings


# --- what has to be measured again ---------------------------------------------------------------


def is_grown(run: Run, settings: Settings) -> bool:
    """Whether the folder holds this run, but at other layers; or of a single sentence, where there are more now."""
    if run.overwrite or not run.has_results():
        return False
    now, then = read_back(identity_in(run, settings)), run.manifest["identity"]["settings"]
    alone = {"num_sentences": 1} if then.get("num_sentences") == 1 else {}
    return {**now, **alone} == then and (now != then or settings_of(settings)["layers"] != then["layers"])


def keeping_sentences(run: Run, settings: Settings) -> Settings:
    """The settings, with no fewer sentences or prompts than the run in the folder has."""
    if not settings.prompt:
        return replace(settings, num_sentences=max(settings.num_sentences, sentences_finished(run)))
    prompts = list(settings.prompt)
    longest = max(prompts, *(manifest["goal"] for manifest in _manifests(run)), key=len)
    return replace(settings, prompt=tuple(longest)) if longest[: len(prompts)] == prompts else settings


def keeping_layers(run: Run, settings: Settings, depth: int) -> Settings:
    """The settings, also with the layers that the run in the folder has, and those that it was to have.

    Raises:
        UserError: the model has no such layer as is asked for.
    """
    asked = choose_layers(settings.layers, depth)
    known = [manifest["identity"]["settings"]["layers"] for manifest in _manifests(run)]  # as they were asked for
    try:
        layers = set(asked).union(*(choose_layers(some, depth) for some in known))
        own = set(choose_layers(known[0], depth))
    except UserError:  # a run of another model, which is refused
        return settings
    return replace(settings, layers=(known[0] and tuple(known[0])) if layers == own else tuple(sorted(layers)))


def layers_begun(run: Run) -> list[int] | None:
    """The layers at which the run in the folder is being measured again, if there are more of them."""
    own, *again = (manifest["identity"]["settings"]["layers"] for manifest in _manifests(run))
    return again[0] if again and again[0] != own else None


def sentences_finished(run: Run) -> int:
    """How many sentences of the run in the folder are finished."""
    if not run.manifest["complete"]:
        return sum("failed" not in record for record in readable_records(run.items_folder).values())
    try:
        return len(read_results(run.folder)["sentences"])
    except UserError:
        return run.manifest["goal"]


def _manifests(run: Run) -> list[dict]:
    """That of the run in the folder, and that of the one that measures it again, if it has begun."""
    return [manifest for manifest in (run.manifest, read_manifest(run.folder, ANEW)) if manifest]
