"""Several processes over one dataset, as `torchrun` starts them; a single one without it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
import os
import re

import torch.distributed as dist

from residual_fisher.common.program import UserError
from residual_fisher.common.text import first_line

TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets besides WORLD_SIZE


@dataclass(frozen=True)
class Processes:
    """This process among `size` of them: number `rank` of all, `local` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def ask_first(self, question: Callable[[], object]):
        """question() as the first process answers it, in every process.

        Raises:
            UserError: in the first, what the question raised; in the others, that the first has stopped.
        """
        if self.size == 1:
            return question()
        answer, error = [None, False], None
        if self.first:
            try:
                answer[0] = question()
            except UserError as raised:
                answer[1], error = True, raised
        dist.broadcast_object_list(answer)
        if error:
            raise error
        if answer[1]:
            raise SystemExit(2)  # the first one says why
        return answer[0]

    def wait_for_all(self) -> None:
        """Returns when every process has come here.

        Raises:
            UserError: another process has ended before.
        """
        if self.size == 1:
            return
        try:
            dist.barrier()
        except RuntimeError as error:
            raise UserError("another process has stopped: its own message says why; run again to go on") from error


def _number(name: str, least: int, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(f"{name}={text} is no number of processes: start several with torchrun, or unset it")
    return int(text)


@contextmanager
def join() -> Iterator[Processes]:
    """This process's place among those that torchrun started. They exchange no tensors, only messages, over gloo.

    Raises:
        UserError: what torchrun sets is incomplete or wrong, or the others do not answer.
    """
    size = _number("WORLD_SIZE", 1, 1)
    if size == 1:
        yield Processes()
        return
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set, but {', '.join(missing)} is not: start several processes with torchrun")
    local = _number("LOCAL_RANK", 0, 0)
    try:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # the first to be done waits for the last
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes of torchrun: {first_line(error)}") from error
    yield Processes(dist.get_rank(), size, local)
    dist.destroy_process_group()
