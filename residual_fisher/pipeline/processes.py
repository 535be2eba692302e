"""Several processes over one dataset, as `torchrun` starts them; a single one without it.

They exchange no tensors, only a few keys of the store that torchrun itself keeps. One key is a counter, which hands out
the windows of the dataset: whichever process is free takes the next, so that fast and slow GPUs end together.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
import json
import os
import re

from residual_fisher.common.program import UserError
from residual_fisher.common.text import first_line

TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets besides WORLD_SIZE
PATIENCE = timedelta(days=30)  # the first process to end waits for the last
STOPPED = "stopped"


class _Counters:
    """What a single process has in place of torchrun's store."""

    def __init__(self):
        self._values: dict[str, int] = {}

    def add(self, key: str, amount: int) -> int:
        self._values[key] = self._values.get(key, 0) + amount
        return self._values[key]


@dataclass(frozen=True)
class Processes:
    """This process among `size` of them: number `rank` of all, `local` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    store: object = field(default_factory=_Counters)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def claim(self) -> int:
        """The next window, from 0 on, that no process has taken yet."""
        return self.store.add("windows", 1) - 1

    def count(self, prompts: int) -> int:
        """How many prompts all processes have finished, these included."""
        return self.store.add("prompts", prompts)

    def ask_first(self, question: Callable[[], object]):
        """question() as the first process answers it, in JSON's types, in every process.

        Raises:
            UserError: in the first process, what the question raised.
            SystemExit: in the others, since the first one has said why.
        """
        if self.size == 1:
            return question()
        key = f"question {self.store.add(f'questions {self.rank}', 1)}"
        if self.first:
            try:
                answer = question()
            except BaseException:
                self.store.set(key, STOPPED)
                raise
            self.store.set(key, json.dumps(answer))
            return answer
        answer = self.store.get(key).decode()
        if answer == STOPPED:
            raise SystemExit(2)
        return json.loads(answer)

    def leave(self) -> bool:
        """Tells the first process that this one's work is done; waits for all of them if this is the first.

        Returns:
            Whether this is the first process, which has the rest to do.
        """
        if self.size > 1:
            self.store.set(f"left {self.rank}", "")
            if self.first:
                self.store.wait([f"left {rank}" for rank in range(self.size)], PATIENCE)
        return self.first


def _from_environment(name: str, least: int, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(f"{name}={text} is no number of processes: start several with torchrun, or unset it")
    return int(text)


def join() -> Processes:
    """This process's place among those that torchrun started.

    Raises:
        UserError: what torchrun sets is incomplete or wrong, or its store does not answer.
    """
    size = _from_environment("WORLD_SIZE", 1, 1)
    if size == 1:
        return Processes()
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set, but {', '.join(missing)} is not: start several processes with torchrun")
    local = _from_environment("LOCAL_RANK", 0, 0)
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        store.set_timeout(PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes of torchrun: {first_line(error)}") from error
    # after a restart, or with another number of processes, all begin again
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Processes(rank, size, local, PrefixStore(f"residual-fisher/{attempt}/{size}", store))
