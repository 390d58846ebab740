"""What many workers share of one study: who tries which candidate, and what became of it.

A candidate is claimed by creating its trial, in one write that already names it. Storages number
trials in the order in which they appear, so of two claims for one candidate every process sees the
same one first: it stands, the other is withdrawn. A result counts only if its trial is still open
when it is told. Hence each candidate has at most one result, whoever dies when.

A trial whose owner is gone is closed by whoever notices. On the owner's own machine the process
table tells at once; elsewhere it is gone when the trial's lease has not moved for its whole length
by the observer's clock, so clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glac.errors import StudyError

LEASE_SECONDS = 60.0
"""How long a silent worker of another machine keeps its candidate."""
KEY, OWNER, LEASE = "config", "owner", "lease"
_CONSTRAINT = "constraints:works"  # as optuna's Trial.set_constraint("works", ...) stores it


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, in ticks; ``None`` if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _machine() -> str:
    """This machine, and the part of it whose process numbers we see."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError):
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
    with contextlib.suppress(OSError):
        names.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return "/".join(names)


def owner_name() -> str:
    """Names this process: machine, process number, start, and a random part for each board."""
    pid = os.getpid()
    return f"{_machine()}:{pid}:{_start_of(pid)}:{secrets.token_hex(3)}"


def _surely_gone(owner: str) -> bool:
    """Whether an owner was a process of this machine that does not exist any more."""
    machine, _, rest = owner.partition(":")
    if machine != _machine():
        return False
    try:
        pid, start, _ = rest.split(":")
        now = _start_of(int(pid))
    except ValueError:
        return False
    return now != start


@dataclass(frozen=True)
class Claim:
    """A candidate that is ours to try."""

    trial_id: int
    number: int
    key: str


class Board:
    """The trials of one study.

    Args:
        optuna: the module.
        storage: opened by ``glac.tuning.storage``.
        name: of the study; made if it is not there.
        lease: seconds after which a silent worker of another machine has lost its candidate.

    Attributes:
        done: finished trials by candidate.
        running: open trials by candidate, those of others and ours.
        lost: trials that were closed without a result, for whatever reason.
    """

    def __init__(self, optuna: Any, storage: Any, name: str, lease: float = LEASE_SECONDS) -> None:
        self._optuna, self._storage, self._lease = optuna, storage, lease
        self._states = optuna.trial.TrialState
        try:
            self._study = self._open(name)
        except StudyError:
            raise
        except Exception as error:
            raise StudyError(f"the study storage is broken ({error})") from None
        self.name = name
        self.owner = owner_name()
        self.done: dict[str, Any] = {}
        self.running: dict[str, Any] = {}
        self.lost = 0
        self._seen: dict[int, tuple[Any, float]] = {}
        self._held: dict[int, float] = {}
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._renewer: threading.Thread | None = None

    def _open(self, name: str) -> int:
        direction = self._optuna.study.StudyDirection.MINIMIZE
        try:
            return int(self._storage.create_new_study([direction], name))
        except self._optuna.exceptions.DuplicatedStudyError:
            return int(self._storage.get_study_id_from_name(name))

    # What the study knows of itself.

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(self._storage.get_study_user_attrs(self._study))

    def describe(self, **values: Any) -> None:
        """Note facts about the study; every worker notes the same ones."""
        known = self.attributes
        for key, value in values.items():
            if known.get(key) != value:
                self._storage.set_study_user_attr(self._study, key, value)

    # Trials.

    def refresh(self) -> None:
        """Read what others did, and close trials whose owners are gone."""
        done: dict[str, Any] = {}
        running: dict[str, Any] = {}
        lost = 0
        trials = self._storage.get_all_trials(self._study, deepcopy=False)
        for trial in sorted(trials, key=lambda t: t.number):
            key = trial.user_attrs.get(KEY)
            if trial.state is self._states.COMPLETE and key is not None:
                done.setdefault(key, trial)
            elif trial.state in (self._states.RUNNING, self._states.WAITING):
                if self._is_stale(trial):
                    self._fail(trial._trial_id)
                    lost += 1
                elif key is not None:
                    running.setdefault(key, trial)
            else:
                lost += 1
        self.done, self.running, self.lost = done, running, lost

    def _is_stale(self, trial: Any) -> bool:
        if trial._trial_id in self._held:
            return False
        owner = str(trial.user_attrs.get(OWNER, ""))
        if _surely_gone(owner):
            return True
        lease, now = trial.user_attrs.get(LEASE), time.monotonic()
        before = self._seen.get(trial._trial_id)
        if before is None or before[0] != lease:
            self._seen[trial._trial_id] = (lease, now)
            return False
        return now - before[1] > self._lease

    def claim(
        self,
        key: str,
        limit: int | None = None,
        params: Mapping[str, Any] | None = None,
        distributions: Mapping[str, Any] | None = None,
    ) -> Claim | None:
        """Take a candidate, or ``None`` if another worker was first.

        Args:
            key: of the candidate.
            limit: candidates that may be tried in all; a claim beyond is withdrawn.
            params: coordinates, for whoever looks at the study.
            distributions: their ranges.
        """
        template = self._optuna.trial.create_trial(
            state=self._states.RUNNING,
            params=dict(params or {}),
            distributions=dict(distributions or {}),
            user_attrs={KEY: key, OWNER: self.owner, LEASE: 0},
        )
        trial_id = self._storage.create_new_trial(self._study, template)
        number = self._storage.get_trial_number_from_id(trial_id)
        claim = Claim(trial_id, number, key)
        self._hold(trial_id)
        self.refresh()
        live = {**self.running, **self.done}
        earlier = {k for k, trial in live.items() if trial.number < number}
        if key in earlier or (limit is not None and len(earlier) >= limit):
            self.withdraw(claim)
            return None
        return claim

    def tell(self, claim: Claim, value: float, works: bool, **attributes: Any) -> bool:
        """Record a result; whether it counts, which it does not if the claim was lost."""
        self._let_go(claim.trial_id)
        try:
            for name, attribute in attributes.items():
                self._storage.set_trial_user_attr(claim.trial_id, name, attribute)
            constraint = -1.0 if works else 1.0
            self._storage.set_trial_system_attr(claim.trial_id, _CONSTRAINT, constraint)
            complete = self._states.COMPLETE
            return bool(self._storage.set_trial_state_values(claim.trial_id, complete, [value]))
        except (self._optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
            return False

    def withdraw(self, claim: Claim) -> None:
        """Give a candidate back untried."""
        self._let_go(claim.trial_id)
        self._fail(claim.trial_id)

    def _fail(self, trial_id: int) -> None:
        # Somebody else may have closed it in the meantime.
        with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
            self._storage.set_trial_state_values(trial_id, self._states.FAIL)

    # The leases of what we hold.

    def _hold(self, trial_id: int) -> None:
        with self._lock:
            self._held[trial_id] = time.monotonic()
        if self._renewer is None:
            self._renewer = threading.Thread(target=self._renew, daemon=True)
            self._renewer.start()

    def _let_go(self, trial_id: int) -> None:
        with self._lock:
            self._held.pop(trial_id, None)

    def _renew(self) -> None:
        pause = self._lease / 4
        while not self._closed.wait(pause):
            with self._lock:
                held = dict(self._held)
            for trial_id, since in held.items():
                age = time.monotonic() - since
                if age >= pause / 2:
                    # A storage that is away for a while: the next renewal, or the result, tells.
                    with contextlib.suppress(Exception):
                        self._storage.set_trial_user_attr(trial_id, LEASE, round(age, 1))

    def close(self) -> None:
        """End the renewals."""
        self._closed.set()
        if self._renewer is not None:
            self._renewer.join(timeout=5)
