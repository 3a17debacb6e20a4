"""Streams from a server that stops; fails if a stream ends without a result or an error event."""

import http.client
import json
import sys
import threading
import urllib.request

# half of the streams fit into the server's drain timeout
MAX_TOKENS = (40, 1500) * 4
# nothing may take longer, so that a server that hangs is a failure
TIMEOUT_S = 60


def main(url: str) -> int:
    """Open the streams, print ``started`` once all have a token, and count how each ended."""
    started = threading.Semaphore(0)
    ends: list[str] = []
    threads = [
        threading.Thread(target=follow, args=(url, max_tokens, started, ends))
        for max_tokens in MAX_TOKENS
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        started.acquire()
    print("started", flush=True)
    for thread in threads:
        thread.join()
    counts = {end: ends.count(end) for end in sorted(set(ends))}
    print(", ".join(f"{count} ended with {end}" for end, count in counts.items()))
    return 0 if set(ends) <= {"a result", "an error event"} else 1


def follow(url: str, max_tokens: int, started: threading.Semaphore, ends: list[str]) -> None:
    """Read one stream to its end; release ``started`` once, at the first token or at the end."""
    body = {"prompt": "Count: one, two,", "max_tokens": max_tokens, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body | {"ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    end, has_begun = "nothing", False
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if not data:
                    continue
                if data == "[DONE]":
                    break
                event = json.loads(data)
                if not has_begun:
                    has_begun = True
                    started.release()
                if "error" in event:
                    end = "an error event"
                elif event["choices"][0]["finish_reason"] is not None:
                    end = "a result"
            else:
                end = "a cut"
    except (OSError, ValueError, http.client.HTTPException) as error:
        end = type(error).__name__
    ends.append(end)
    if not has_begun:
        started.release()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
