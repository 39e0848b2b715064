"""`python worker_alive.py POOL`: exit 0 when a worker of the work pool was heard of lately, for health checks.

It asks the Prefect API that the environment names. A worker says every 30 s that it lives.
"""

import base64
import json
import os
import sys
import urllib.request


def online(pool: str) -> bool:
    """Whether Prefect thinks that a worker of the pool is there."""
    url = f"{os.environ['PREFECT_API_URL'].rstrip('/')}/work_pools/{pool}/workers/filter"
    headers = {"Content-Type": "application/json"}
    if login := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    with urllib.request.urlopen(urllib.request.Request(url, b"{}", headers), timeout=5) as answer:
        return any(worker["status"] == "ONLINE" for worker in json.load(answer))


if __name__ == "__main__":
    try:
        sys.exit(not online(sys.argv[1]))
    except OSError:  # no answer, or one that refuses
        sys.exit(1)
