"""Stop strings cut a text at the same character for any split of it into parts."""

from hypothesis import given
from hypothesis import strategies as st

from server.http.stop_strings import StopStrings, _Search

LETTERS = st.text("ab", max_size=30)


def feed(parts, stops):
    """(emitted text, found stop string) after all parts, or at the first stop."""
    cutter, shown = StopStrings(stops), ""
    for part in parts:
        text, stop = cutter.push(part)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + cutter.finish(), None


def exact(text, stops):
    """(text before the stop string that ends first, that stop string or None)."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@given(st.lists(LETTERS, max_size=6), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_the_cut_does_not_depend_on_the_split(parts, stops):
    text = "".join(parts)
    assert (
        feed(parts, stops) == feed([text], stops) == feed(list(text), stops) == exact(text, stops)
    )


@given(LETTERS, st.text("ab", min_size=1, max_size=5))
def test_no_part_of_a_stop_string_is_emitted(text, stop):
    cutter, shown = StopStrings([stop]), ""
    for letter in text:
        part, found = cutter.push(letter)
        shown += part
        assert exact(text, [stop])[0].startswith(shown)
        if found:
            break


@given(st.lists(LETTERS, max_size=6), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_a_stop_string_can_be_included(parts, stops):
    without, stop = feed(parts, stops)
    cutter, shown, found = StopStrings(stops, include_stop=True), "", None
    for part in parts:
        text, found = cutter.push(part)
        shown += text
        if found:
            break
    shown += cutter.finish()
    assert (shown, found) == (without + (stop or ""), stop)


def test_text_that_cannot_begin_a_stop_is_emitted_at_once():
    assert StopStrings(["xyz"]).push("abc") == ("abc", None)
    assert StopStrings([]).push("abc") == ("abc", None)


NEARLY = st.sampled_from(["ab" * 8, "a" * 15 + "b", "aab" * 5 + "b", "b" + "a" * 12, "abacabadab"])


@given(st.lists(st.one_of(NEARLY, LETTERS), max_size=8), st.lists(NEARLY, min_size=1, max_size=5))
def test_long_stop_strings_that_nearly_match_are_found_where_they_end_first(parts, stops):
    text = "".join(parts)
    assert feed(parts, stops) == feed(list(text), stops) == exact(text, stops)


@given(LETTERS, LETTERS, st.text("ab", min_size=1, max_size=4))
def test_a_stop_string_does_not_begin_in_text_that_was_finished(before, after, stop):
    cutter = StopStrings([stop])
    text, found = cutter.push(before)
    if found is None:
        assert text + cutter.finish() == before
        text, found = cutter.push(after)
        assert (text + cutter.finish(), found) == exact(after, [stop])


class CountedTable(list):
    """A table that counts how often it is read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@given(st.sampled_from(["a" * 1023 + "b", "ab" * 511 + "b", "a" * 511 + "b" + "a" * 512]))
def test_the_cost_per_character_does_not_grow_with_the_stop_string(stop):
    search = _Search(stop)
    table = search._shorter = CountedTable(search._shorter)
    text = (stop[:-1] * 5)[:4096]
    for letter in text:
        search.push(letter)
        assert search.num_matched < len(stop)
    # each character is compared a few times on average: to extend the table, and to search
    assert table.reads <= 4 * len(text) and len(table) <= len(stop) + 1
