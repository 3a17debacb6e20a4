"""Streams from a server that stops; fails if a stream ends without a result or an error event."""

import json
import sys
import threading
import urllib.request

NUM_STREAMS = 8
BODY = {"prompt": "Count: one, two, three,", "max_tokens": 600, "stream": True, "ignore_eos": True}


def main(url: str) -> int:
    """Open the streams, print ``started`` once all have a token, and count how each ended."""
    started = threading.Semaphore(0)
    ends: list[str] = []
    threads = [
        threading.Thread(target=follow, args=(url, started, ends)) for _ in range(NUM_STREAMS)
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
    return 0 if set(ends) <= {"a result", "an error event"} and len(ends) == NUM_STREAMS else 1


def follow(url: str, started: threading.Semaphore, ends: list[str]) -> None:
    """Read one stream to its end."""
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(BODY).encode(), {"Content-Type": "application/json"}
    )
    end, tokens = "nothing", 0
    try:
        with urllib.request.urlopen(request) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if not data:
                    continue
                if data == "[DONE]":
                    break
                event = json.loads(data)
                tokens += 1
                if tokens == 1:
                    started.release()
                if "error" in event:
                    end = "an error event"
                elif event["choices"][0]["finish_reason"] is not None:
                    end = "a result"
            else:
                end = "a cut"
    except (OSError, ValueError) as error:
        end = f"{type(error).__name__}"
    finally:
        if not tokens:
            started.release()
    ends.append(end)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
