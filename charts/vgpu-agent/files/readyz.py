"""Asks the agents of each HOST:PORT until one is ready: `readyz.py SECONDS HOST:PORT...`.

Runs in the pod of `helm test`. DNS and network policies take a moment to know a new pod, so it asks
again until the seconds are over.
"""

import http.client
import socket
import sys
import time


def ask(host: str, port: int) -> tuple[bool, str]:
    """Whether one is ready, and what it or those that are not said."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return False, f"no agent pod runs, or DNS does not answer ({error})"
    answers = []
    for address in sorted({str(each[4][0]) for each in found}):
        connection = http.client.HTTPConnection(address, port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            reply = connection.getresponse()
            answers.append(f"{address}: {reply.status} {reply.read(200).decode().strip()}")
            if reply.status == 200:
                return True, answers[-1]
        except (OSError, http.client.HTTPException) as error:
            answers.append(f"{address}: {error!r}")
        finally:
            connection.close()
    return False, "; ".join(answers)


def main(seconds: str, *agents: str) -> int:
    """The exit code: 1 where any of them has no agent that is ready."""
    until = time.monotonic() + float(seconds)
    failed = 0
    for agent in agents:
        host, _, port = agent.rpartition(":")
        ready, answer = ask(host, int(port))
        while not ready and time.monotonic() < until:
            time.sleep(1)
            ready, answer = ask(host, int(port))
        print(f"{agent}: {'ready' if ready else 'no agent is ready'}: {answer}")
        failed |= not ready
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
