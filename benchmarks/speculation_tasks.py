"""Tasks of ``memplus bench speculation``: answers that copy their prompts, and others."""

from dataclasses import dataclass

_PASSAGE = (
    "The harbour master kept a ledger of every ship that entered the bay. On the left page he wrote"
    " the name of the vessel, its home port and its captain; on the right page he noted the cargo,"
    " the number of days at sea and the state of the hull. In forty years he missed only one entry,"
    " on the night when the lighthouse burned. Sailors said that he could tell the weather of the"
    " coming week from the colour of the ropes on the quay, and farmers from the valley came down"
    " to ask him when to cut their hay. He never took money for his advice. Instead he asked each"
    " visitor for one story about the sea, and these he wrote in a second ledger, which nobody saw"
    " until he died. It is now kept in the town library, bound in green leather, and children read"
    " from it aloud on the first Sunday of every month."
)
_FILE = """[server]
host = 127.0.0.1
port = 8080
workers = 4
timeout_seconds = 30
max_body_bytes = 1048576
log_level = info

[database]
url = postgres://localhost/library
pool_size = 16
connect_timeout_seconds = 5
retry_limit = 3

[cache]
folder = /var/cache/library
size_gib = 8
evict_after_hours = 72

[mail]
sender = desk@library.example
smtp_host = mail.library.example
smtp_port = 587
use_tls = true

[search]
index_folder = /var/lib/library/index
rebuild_at = 03:30
results_per_page = 25
highlight_matches = true"""


@dataclass(frozen=True)
class Task:
    """One prompt.

    Attributes:
        copies: whether the answer repeats the prompt.
        start: the beginning of the answer, which is part of the prompt: a small model then copies.
        temperature: 0 takes the likeliest tokens, which a small model often repeats.
    """

    name: str
    copies: bool
    request: str
    start: str = ""
    temperature: float = 0.0

    @property
    def prompt(self) -> str:
        """The prompt in the chat format of SmolLM2."""
        user = f"<|im_start|>user\n{self.request}<|im_end|>\n"
        return f"{user}<|im_start|>assistant\n{self.start}"


TASKS = (
    Task(
        "quote a passage",
        True,
        f"Repeat the following passage word for word.\n\n{_PASSAGE}",
        _PASSAGE[: _PASSAGE.index(" In forty")],
    ),
    Task(
        "edit a file",
        True,
        f"Change log_level to debug in this file and print the whole file.\n\n```\n{_FILE}\n```",
        "```\n[server]\nhost =",
    ),
    Task("explain", False, "Explain why the sky is blue."),
    Task("tell a story", False, "Write a long story about a lighthouse.", temperature=1.0),
)
