"""How many of a run's sentences or prompts may fail (NaN, no convergence) before it stops."""

SOME_FAILED = 3  # the exit code of a run that is complete but for some of them
MAX_SHARE, MIN_JUDGED = 0.5, 8  # it stops if more than this share have failed, of at least so many


def too_many(failed: int, tried: int) -> bool:
    return tried >= MIN_JUDGED and failed > MAX_SHARE * tried
