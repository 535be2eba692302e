"""Which runs of the experiment are one: what counts of their options, and what a run has of what is asked for."""

from dataclasses import replace

from residual_fisher.common.options import identity_of, settings_of
from residual_fisher.common.program import UserError
from residual_fisher.common.run import Run, read_back, sources_of, stamps
from residual_fisher.experiment.records import read_results
from residual_fisher.experiment.settings import Settings, choose_layers


def identity_settings(settings: Settings) -> dict:
    """The options that count. More sentences extend a run, but a single one has no other to be compared with."""
    found = identity_of(replace(settings, scale_unit=settings.unit))
    found["num_sentences"] = 1 if settings.wanted == 1 else "several"
    return {**found, "prompt": "given"} if settings.prompt else found


def identity_in(run: Run, settings: Settings) -> dict:
    """`identity_settings`, as a finished run in the folder has them if a single sentence may be one of its own."""
    found = identity_settings(settings)
    if run.manifest and run.manifest["complete"] and "num_sentences" in run.manifest["identity"]["settings"]:
        several = run.manifest["identity"]["settings"]["num_sentences"] == "several"
        found["num_sentences"] = "several" if several else found["num_sentences"]
    return found


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
        document = read_results(run.folder)
        known = document["experiment_config"]["layers"]
        among = set(choose_layers(settings.layers, document["environment"]["depth"])) <= set(known)
    except (UserError, LookupError, TypeError):  # to be computed again, refused, or a map's
        return settings
    return replace(settings, layers=then and tuple(then)) if among else settings


def is_alone(run: Run, settings: Settings) -> bool:
    """Whether the folder holds this run of a single sentence, and now there are more."""
    if run.overwrite or not run.has_results():
        return False
    now, (_, goal) = read_back(identity_settings(settings)), sources_and_goal(settings)
    then = run.manifest["identity"]["settings"]
    same = not settings.prompt or goal[:1] == run.manifest["goal"]
    return same and then != now and {**then, "num_sentences": "several"} == now
