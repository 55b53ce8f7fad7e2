"""The processes that train together, a GPU each: what they tell each other.

Every rank does the same things in the same order; what they decide together each decides from the same values, so that
all come to the same. Python objects travel over gloo whatever the device, so that nothing of them takes its memory.

So that nobody waits for one who will not come:

- With whatever ranks exchange (`all`, `sum`, …) each says that it is well, or what went wrong.
- An error inside `together` is said at the next exchange, where the others are or will be, and they raise it there.
  After it all ranks do the same again: they may exchange once more, to save what there is.
- Inside `bound`, tensors are computed together, and nobody could say an error. Who fails there notes it in the store
  that the processes found each other by, and ends; the others find it gone, and the note. After it nothing more can be
  exchanged (`lost`).
- Ctrl-C must not come amid an exchange: what exchanges runs in an asyncio task, which is interrupted where it awaits.
"""

import asyncio
import json
import logging
import os
import pickle
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from axpo.config import Config, ConfigError
from axpo.launch import TOLD

PATIENCE = timedelta(hours=1)  # for which a rank waits for the others: the rollouts of one may take so much longer
INTERRUPTED = "interrupted"
_NOTE = "first to fail"

T = TypeVar("T")


class RankError(RuntimeError):
    """Another process of the training has failed, and says how."""


class RankLostError(RankError):
    """Another process of the training has ended without a word."""


@dataclass
class Ranks:
    """This process among those that train together: `rank` of 0..size−1. Rank 0, `main`, writes the run folder."""

    rank: int = 0
    size: int = 1
    failed: bool = False  # an error of one ends all
    lost: bool = False  # and the others can be told nothing any more
    store: "dist.Store | None" = None  # type: ignore[name-defined]  # by which the processes have found each other

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of so many things are this rank's."""
        return range(self.rank, count, self.size)

    def all(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank.

        Raises RankError where another rank has failed, KeyboardInterrupt where it was interrupted.
        """
        if self.size == 1:
            return [value]
        gathered = self._gathered(("", pickle.dumps(value)))
        for rank, (said, _) in enumerate(gathered):
            if said:
                self.failed = True
                raise _told(rank, said)
        return [pickle.loads(sent) for _, sent in gathered]

    def to_main(self, value: T) -> list[T]:
        """The values of all ranks on rank 0, and nothing on the others. Raises as `all` does."""
        if self.size == 1:
            return [value]
        sent = pickle.dumps(value)  # what cannot be sent is an error that can still be said
        self.meet()
        gathered: list[bytes] | None = [b""] * self.size if self.main else None
        dist.gather_object(sent, gathered)
        return [pickle.loads(each) for each in gathered or []]

    def of_main(self, value: T) -> T:
        """The value of rank 0, on every rank. Raises as `all` does."""
        return self.all(value if self.main else None)[0]  # type: ignore[return-value]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, added in their order."""
        return [sum(each) for each in zip(*self.all(list(values)), strict=True)]

    def sum_gradients(self, parameters: Sequence[Tensor], device: torch.device) -> None:
        """Give every rank the sums of all ranks' gradients, added on the device. One that is nowhere stays away."""
        if self.size == 1 or not parameters:
            return
        with self.bound():
            known = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int, device=device)
            dist.all_reduce(known)
            for parameter, count in zip(parameters, known.tolist(), strict=True):
                if count:
                    own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    total = own.to(device)
                    dist.all_reduce(total)
                    parameter.grad = total.to(parameter.device)

    def meet(self) -> None:
        """Wait for all ranks, each of which is well. Raises as `all` does."""
        self.all(None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong inside on one rank is told to the others, who raise it where they next exchange something.

        So nobody waits for who will not come, and what is done after an error, such as saving, is done by all.
        """
        try:
            yield
            self.meet()
        except BaseException as error:
            if self.size > 1 and not isinstance(error, RankError):
                if self.failed:
                    self._note(error)  # it was told already, or the others do not wait for anything any more
                else:
                    self.failed = True
                    self._gathered((_said(error), b""))
            raise

    @contextmanager
    def bound(self) -> Iterator[None]:
        """What all ranks compute together, once all are here and well. Raises RankError where another has failed."""
        self.meet()
        try:
            yield
        except BaseException as error:
            if self.size > 1:
                self.failed = self.lost = True
                if not isinstance(error, RankError):
                    if _is_of_the_connection(error):
                        raise self._gone() from error
                    self._note(error)
            raise

    def _gathered(self, value: T) -> list[T]:
        values: list[T | None] = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            self.failed = self.lost = True
            raise self._gone() from error
        return values  # type: ignore[return-value]

    def _note(self, error: BaseException) -> None:
        """Leave what went wrong where the others look once they find this rank gone. The first note stays."""
        assert self.store is not None
        with suppress(RuntimeError):  # rank 0 keeps the store, and may have ended
            self.store.compare_set(_NOTE, "", json.dumps([self.rank, _said(error)]))

    def _gone(self) -> BaseException:
        """What another rank has noted that is gone, or that it has left no note."""
        assert self.store is not None
        with suppress(RuntimeError):
            if self.store.check([_NOTE]):
                return _told(*json.loads(self.store.get(_NOTE)))
        return RankLostError("another process of the training has ended")


ALONE = Ranks()


def _said(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
        return INTERRUPTED
    return "".join(traceback.format_exception(error)).strip()


def _told(rank: int, said: str) -> BaseException:
    if said == INTERRUPTED:
        return KeyboardInterrupt()
    return RankError(f"process {rank} of the training has failed: {said.splitlines()[-1]}\n{said}")


def _is_of_the_connection(error: BaseException) -> bool:
    """Whether the processes could not reach each other: of gloo's errors the words alone tell."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def computing(config: Config, ranks: Ranks) -> AbstractContextManager[None]:
    """Surrounds what uses the weights, for which ranks that share them need each other."""
    return ranks.bound() if config.parallel.sharding == "full" else nullcontext()


def in_order(shares: Sequence[Mapping[int, T]]) -> list[T]:
    """What each rank has, by its place in the whole."""
    whole = {place: value for share in shares for place, value in share.items()}
    return [whole[place] for place in sorted(whole)]


@contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """Join the processes that torchrun, accelerate or axpo has started; alone where none has.

    Of several each takes a GPU of its own for what is on "cuda". Raises ConfigError where the config is for another
    number of processes, or there are fewer GPUs. An error is raised on rank 0, which has been told; the others end.
    """
    processes = config.parallel.processes
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes:
        raise ConfigError(
            f"parallel.processes: got {processes}, but torchrun or accelerate has started {started}; must be {started}"
        )
    if processes == 1:
        yield ALONE
        return
    store, rank, _ = next(rendezvous("env://", timeout=PATIENCE))
    ranks = Ranks(rank, processes, store=dist.PrefixStore("axpo", store))  # type: ignore[attr-defined]
    local = int(os.environ.setdefault("LOCAL_RANK", os.environ["RANK"]))  # vLLM reads it too
    backend = "gloo"
    if config.device == "cuda":
        if local >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise ConfigError(f"parallel.processes: got {processes}, but there are {gpus} GPUs; one each is needed")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    if not ranks.main:
        # What concerns all rank 0 warns of too; faults of tools in this rank's rollouts are in the figures alone.
        logging.getLogger("axpo").setLevel(logging.ERROR)
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=PATIENCE)
    try:
        with ranks.together():
            yield ranks
    except BaseException as error:
        told = not ranks.lost or (isinstance(error, RankError) and not isinstance(error, RankLostError))
        if ranks.main or not told:
            raise
        raise SystemExit(TOLD) from None
    finally:
        ranks.store = None
        if not ranks.lost or backend == "gloo":  # NCCL would wait for those that have gone
            dist.destroy_process_group()
