"""What this machine's own servers are asked by: never a proxy, whatever the environment says of it."""

import os

OWN = ("localhost", "127.0.0.1", "::1")


def never_proxied() -> None:
    """Name the loopback addresses in `no_proxy`, which every HTTP client and child process reads."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    words = [word for word in named.split(",") if word.strip()]
    os.environ["no_proxy"] = ",".join([*words, *(one for one in OWN if one not in words)])
    os.environ["NO_PROXY"] = os.environ["no_proxy"]
