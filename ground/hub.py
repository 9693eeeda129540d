"""The hub of data sets and models: asked before anything starts; licence, revision and outage told apart.

revision that does not exist, licence not accepted    UserError, status 2
no answer, an error of the hub's own                   Outage, status 69: the same command later
"""

import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote

from ground.errors import Outage, UserError, disk_error, first_line

ANSWER_SECONDS = 8.0  # that the hub has to begin an answer in, when it is asked
SILENCE_SECONDS = 60.0  # without a byte, after which a download is tried again: a slow one goes on
GATED = "its licence is not accepted; accept it on the repository's page and run `hf auth login`"
LATER = "run the same command again later, or with HF_HUB_OFFLINE=1 where all is in the hub's cache"
_LOCK = Lock()
# By the names of their classes: the libraries of the hub are not imported to read an error.
REFUSALS = {
    "GatedRepoError": GATED,
    "RevisionNotFoundError": "no such revision; correct it",
    "RepositoryNotFoundError": "no such repository, or not for you; correct it, or run `hf auth login`",
    "RemoteEntryNotFoundError": "no such file in it; name another",
}
NO_ANSWER = {
    "TimeoutException", "NetworkError", "ProtocolError", "LocalEntryNotFoundError", "FSTimeoutError",
    "OfflineModeIsEnabled", "ClientConnectionError", "ConnectionError", "TimeoutError",
}  # fmt: skip


@dataclass(frozen=True)
class Repository:
    """`where` names what asks for it, as `<file>: <key>`."""

    kind: str  # model | dataset
    name: str
    revision: str
    where: str


def ask(repositories: Iterable[Repository]) -> None:
    """Refuse repositories that the hub does not give; folders of this machine are not asked for.

    Each is asked for once, none a second time. Raises UserError, or Outage.
    """
    if not is_offline():
        for _, error in answers(repositories):
            if error:
                raise error


def answers(repositories: Iterable[Repository]) -> Iterator[tuple[Repository, UserError | None]]:
    """What the hub says to each, asked for once: None where it gives it, else UserError or Outage."""
    asked = {(one.kind, one.name, one.revision): one for one in repositories}
    left = [one for one in asked.values() if not Path(one.name).is_dir()]
    if not left:
        return
    end_silence()
    yield left[0], _refusal(left[0])  # alone: a hub that does not answer is waited for once
    with ThreadPoolExecutor(8) as pool:
        yield from zip(left[1:], pool.map(_refusal, left[1:]), strict=True)


def is_offline() -> bool:
    """By its user's choice: what is in the hub's cache is taken without a question."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _refusal(one: Repository) -> UserError | None:
    from huggingface_hub import constants
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    place = f"{constants.ENDPOINT}/api/{one.kind}s/{one.name}"
    revision = f"{place}/revision/{quote(one.revision, safe='')}?expand[]=sha"
    try:
        for address in (f"{place}/auth-check", revision):
            answer = get_session().get(address, headers=build_hf_headers(), timeout=ANSWER_SECONDS)
            # A mirror may have no such check.
            if answer.status_code != 404 or address == revision or _code(answer):
                hf_raise_for_status(answer)
    except Exception as error:  # any error of network or hub
        return refusal(error, f"{one.where}: {one.name}@{one.revision}", "look at it")
    return None


def _code(answer: object) -> str | None:
    found: str | None = getattr(answer, "headers", {}).get("X-Error-Code")
    return found


def end_silence() -> None:
    """Let no request to the hub wait for ever: the library's own default is no limit.

    Once: the library closes its client when it is given another, also under requests of other threads.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    with _LOCK:
        if _http._GLOBAL_CLIENT_FACTORY is not _client:
            set_client_factory(_client)
            logging.getLogger(_http.__name__).addFilter(_is_long_wait)


def _is_long_wait(record: logging.LogRecord) -> bool:
    """Of what the library says of its next tries, what a user wonders about: waits of minutes."""
    waits = re.search(r"Waiting ([\d.]+)s", record.getMessage())
    return record.levelno > logging.WARNING or bool(waits and float(waits[1]) > ANSWER_SECONDS)


def _client() -> Any:
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.timeout = SILENCE_SECONDS
    return client


def refusal(error: BaseException, where: str, remedy: str) -> UserError:
    """What an error of fetching from the hub means to its user; `remedy` is for any other error."""
    chain = list(_chain(error))
    for one in chain:
        if line := disk_error(one):
            return UserError(f"{where}: {line}")
    for one in chain:
        for name in REFUSALS:
            if name in _names(one):
                return UserError(f"{where}: {REFUSALS[name]}")
    for one in chain:
        status = getattr(getattr(one, "response", None), "status_code", 0)
        if status in (401, 403):
            return UserError(f"{where}: the hub answers {status}; run `hf auth login`")
        if status == 429 or status >= 500:
            return Outage(f"{where}: the hub answers {status}; {LATER}")
        if _names(one) & NO_ANSWER:
            return Outage(f"{where}: the hub does not answer ({first_line(one)}); {LATER}")
    return UserError(f"{where}: {first_line(error)}; {remedy}")


def _names(error: BaseException) -> set[str]:
    return {base.__name__ for base in type(error).__mro__}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came from, the cause of all first."""
    if error is not None:
        yield from _chain(error.__cause__ or error.__context__)
        yield error
