"""The blocks that a page marks, and those that are found."""

import pytest

from tests.docs.pages import Block, marked_blocks

PAGE = """
<!-- runnable -->
```python
x = 1

y = 2
```

    not marked

<!-- runnable -->

    memplus serve

    echo done
Text.

<!-- output -->
```text
done
```
"""


def test_fenced_and_indented_blocks_are_found_with_their_lines():
    assert marked_blocks(PAGE) == [
        Block("runnable", "python", "x = 1\n\ny = 2\n", 4),
        Block("runnable", "bash", "memplus serve\n\necho done\n", 13),
        Block("output", "text", "done\n", 20),
    ]


def test_a_mark_without_a_block_is_an_error():
    with pytest.raises(ValueError, match="line 1: no block follows"):
        marked_blocks("<!-- runnable -->\nText.")
