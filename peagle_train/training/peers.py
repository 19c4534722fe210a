"""Several processes as one run: they wait for each other where one may take minutes, and when one fails all of them end
within a second or two, its own message first.

Collectives are not for waiting: NCCL gives up after 10 minutes, and with a dead rank it hangs until then. Both go over the
key-value store in which the processes met (torchrun's, or rank 0's).
"""

import atexit
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

POLL_SECONDS = 0.5
PATIENCE = timedelta(days=30)
"""Nobody waits so long: a rank that ends, ends all (see `Peers`), and so does whoever started them."""

# A run that torchrun has restarted meets in the same store.
PREFIX = f"peagle_train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
FAILED = f"{PREFIX}/failed"


class Peers:
    """This process's line to the others. A thread watches whether one of them has failed, and then ends this process: the
    main thread may be in a collective that never ends.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store = _connect()
        self._meetings = 0
        self._over = threading.Event()

    def watch(self) -> None:
        """Start the thread; it ends before Python does, which threads inside of a library's call do not survive well."""
        thread = threading.Thread(target=self._watch, args=[_connect()], daemon=True, name="peers")
        thread.start()

        def end() -> None:
            self._over.set()
            thread.join()

        atexit.register(end)

    def _watch(self, store: dist.Store) -> None:
        try:
            while not store.check([FAILED]):
                if self._over.wait(POLL_SECONDS):
                    return
            failed, code = json.loads(store.get(FAILED))
        except RuntimeError:  # the store is gone, so its owner has ended: well, or the launcher ends us
            return
        if failed != self.rank and not self._over.is_set():
            _say(f"peagle_train: rank {self.rank} stops because rank {failed} has failed; its message is above\n")
            os._exit(code)

    def collect(self, value: str = "", ranks: int | None = None) -> list[str]:
        """The values of all ranks, or of the first few, once all are here."""
        self._meetings += 1
        keys = [f"{PREFIX}/meeting {self._meetings}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], value)
        self.store.wait(keys, PATIENCE)
        values = [found.decode() for found in self.store.multi_get(keys[:ranks])]
        if self._meetings > 1:  # which everybody has left, or he would not be here
            self.store.delete_key(f"{PREFIX}/meeting {self._meetings - 1}/{self.rank}")
        return values

    def announce(self, text: str, code: int) -> None:
        """Print why this rank fails: in full if it is the first that does, in a line if a later one has another reason, not
        at all if it has the same.
        """
        self._over.set()
        try:
            if self.store.add(f"{FAILED}/number", 1) == 1:
                _say(_signed(text, self.rank))
                self.store.set(f"{FAILED}/text", text)
                self.store.set(FAILED, json.dumps([self.rank, code]))
                return
            self.store.wait([FAILED], timedelta(seconds=10))
            if self.store.get(f"{FAILED}/text").decode() == text:
                return
            _say(f"peagle_train: rank {self.rank} stops, too: {text.strip().splitlines()[-1]}\n")
        except RuntimeError:  # no store any more: say it in full
            _say(_signed(text, self.rank))


_peers: Peers | None = None


def connect() -> None:
    """Start to watch the others; the sooner the better once the processes have met. Nothing where there is a single one."""
    global _peers
    if _peers is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        _peers = Peers()
        _peers.watch()


def wait_for_all() -> None:
    """Wait until every rank is here, however long that takes. No collective."""
    from_main()


def from_main(value: str = "") -> str:
    """Rank 0's value, on every rank, once all are here."""
    connect()
    return value if _peers is None else _peers.collect(value, ranks=1)[0]


def from_all(value: str) -> list[str]:
    """Every rank's value, by rank, once all are here."""
    connect()
    return [value] if _peers is None else _peers.collect(value)


def agree(values: dict[str, str]) -> None:
    """Wait for all ranks; ValueError where a value, by the words for it, is not that of rank 0."""
    digests = {what: hashlib.sha256(value.encode()).hexdigest() for what, value in values.items()}
    first = json.loads(from_main(json.dumps(digests)))
    for what, digest in digests.items():
        if digest != first[what]:
            raise ValueError(
                f"this process has another {what} than rank 0: give the same recipe, files and target on every machine"
            )


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """The processes of a machine do what is inside one after the other; all ranks come and go together."""
    connect()
    if _peers is None:
        yield
        return
    turn = int(os.environ.get("LOCAL_RANK", "0"))
    turns = max(map(int, from_all(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    for _ in range(turn):
        wait_for_all()
    yield
    for _ in range(turns - turn):
        wait_for_all()


def stop(text: str, code: int) -> NoReturn:
    """Say why, and end this process and with it the run, at once: nothing at exit may wait for the others.

    `text`: whole lines, the same on every rank where the reason is the same: one of them then says it, with its rank.
    """
    peers = _peers
    if peers is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true":
        try:  # a mistake that shows before the processes meet: torchrun's store is there already
            peers = Peers()
        except RuntimeError:
            pass
    if peers is None:
        _say(_signed(text, os.environ.get("RANK", "0")))
    else:
        peers.announce(text, code)
    os._exit(code)


def _connect() -> dist.Store:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )


def _signed(text: str, rank: int | str) -> str:
    return f"{text.rstrip()} (rank {rank})\n"


def _say(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()
