"""The web page in Chromium, against real servers."""

import json

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.chromium import chromium
from tests.server.running import running

pytestmark = pytest.mark.slow
# Chromium itself logs these for answers that are errors and for requests that fail
NETWORK_LINE = "Failed to load resource"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def slow_server(slow_folder):
    """A model without memory layers and without a chat template."""
    with running(slow_folder) as server:
        yield server


@pytest.fixture
def open_page(browser):
    """Opens a page; the test fails if the page logs an error."""
    errors, contexts = [], []

    def open_page(url, width=1280, scheme="light", prepare=lambda page: None):
        contexts.append(
            browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        )
        contexts[-1].set_default_timeout(10_000)
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: line.type == "error" and errors.append(line.text))
        prepare(page)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [error for error in errors if NETWORK_LINE not in error]


@pytest.fixture
def page(open_page, memory_server):
    return open_page(memory_server.url)


def ask(page, text, **options):
    for name, value in options.items():
        page.fill(f"#{name}", str(value))
    page.fill("#input", text)
    page.keyboard.press("Control+Enter")


# a busy machine draws late
expect.set_options(timeout=30_000)


def finish(page, text, **options):
    """Ask, and wait for the end of the answer."""
    ask(page, text, **options)
    expect(page.locator("#end")).not_to_have_text("\u2013")
    expect(page.locator("#send")).to_be_visible()


def events(*texts, **last):
    """The body of a stream of completions."""
    chunks = [{"choices": [{"text": text, "finish_reason": None}]} for text in texts]
    lines = [*map(json.dumps, [*chunks, last] if last else chunks), "[DONE]"]
    return "".join(f"data: {line}\n\n" for line in lines)


def answering(page, body, status=200):
    """Answer the page's completions with this body instead of the server's."""
    page.route("**/v1/completions", lambda route: route.fulfill(status=status, body=body))


def assert_accessible(page):
    found = Axe().run(page).response["violations"]
    assert not [f"{v['id']}: {v['help']}" for v in found if v["impact"] in ("serious", "critical")]


def assert_fits(page):
    assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") == 0


def test_an_answer_is_streamed_and_its_rows_are_shown(page, memory_server):
    body = {"prompt": "lookup", "max_tokens": 20, "temperature": 0, "memory_trace": True}
    (choice,) = memory_server.complete(**body).json()["choices"]
    finish(page, "lookup", max_tokens=20, temperature=0)
    assert page.locator("#answers .completion").text_content() == "lookup" + choice["text"]
    expect(page.locator("#usage")).to_have_text("6 + 20")
    expect(page.locator("#end")).to_have_text("length limit")
    expect(page.locator("#first-token")).to_contain_text("ms")
    expect(page.locator("#speed")).to_contain_text("/s")

    def shown():
        lines = page.locator("#layer-tables table").first.locator("tbody tr").all_inner_texts()
        return [line.split() for line in lines]

    def read(token):
        first = choice["memory_trace"][token][0]
        pairs = zip(first["rows"], first["weights"], strict=True)
        return [[str(row), f"{weight:.3f}"] for row, weight in pairs]

    expect(page.locator("#token-number")).to_have_text("20 of 20")
    assert shown() == read(19)
    page.focus("#timeline")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token-number")).to_have_text("2 of 20")
    assert shown() == read(1)
    slider = page.locator("#timeline")
    assert slider.get_attribute("aria-valuenow") == "2"
    assert f"row {choice['memory_trace'][1][0]['rows'][0]}" in slider.get_attribute(
        "aria-valuetext"
    )


def test_pointing_at_the_pictures_names_rows_and_weights(page):
    finish(page, "lookup", max_tokens=20, temperature=0)
    expect(page.locator("#token-number")).to_have_text("20 of 20")
    box = page.locator("#timeline").bounding_box()
    tip = page.locator("#tip")
    for y in range(10, 120, 6):
        page.mouse.move(box["x"] + 8, box["y"] + y)
        if tip.is_visible():
            break
    assert "weight" in tip.text_content()
    expect(page.locator("#token-number")).to_have_text("1 of 20")
    expect(page.locator("#answers .marked")).to_have_count(1)
    page.mouse.move(1, 1)
    expect(tip).to_be_hidden()
    page.locator("#answer-rows .row-button").first.focus()
    assert 0 < page.locator("#answer-rows tbody tr").count() <= 10
    expect(page.locator("#server-rows tbody tr").first).to_be_visible()
    expect(page.locator("#tables")).to_contain_text("device")


@pytest.mark.parametrize("by_key", [False, True])
def test_stop_ends_the_request_at_the_server(open_page, slow_server, by_key):
    page = open_page(slow_server.url)
    expect(page.locator("#no-chat")).to_contain_text("no chat template")
    expect(page.locator("#chat-mode")).to_be_disabled()
    expect(page.locator("#memory")).to_be_hidden()
    tokens_before = slow_server.metric("memplus:generation_tokens_total")
    ask(page, "go on", max_tokens=3000, temperature=0)
    expect(page.locator("#answers .completion")).not_to_have_text("go on")
    if by_key:
        page.keyboard.press("Escape")
    else:
        page.click("#stop")
    expect(page.locator("#end")).to_have_text("stopped")
    while slow_server.metric("memplus:num_requests_running"):
        pass
    assert slow_server.metric("memplus:generation_tokens_total") - tokens_before < 3000


def test_a_chat_sends_the_conversation_so_far(page):
    page.get_by_text("Chat", exact=True).click()
    page.fill("#system", "Be brief.")
    finish(page, "one", max_tokens=4, temperature=0)
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "two")
    expect(page.locator(".assistant")).to_have_count(2)
    expect(page.locator("#send")).to_be_visible()
    messages = json.loads(asked.value.post_data)["messages"]
    roles = [message["role"] for message in messages]
    assert roles == ["system", "user", "assistant", "user"]
    first = page.locator(".assistant").first.text_content().removeprefix("Model")
    assert messages[2]["content"] == first
    expect(page.locator("#token-number")).to_have_text("4 of 4")
    page.click("#clear")
    expect(page.locator("#answers")).to_be_hidden()


def test_errors_have_the_words_of_the_server(page):
    ask(page, "a", temperature=1000)
    expect(page.get_by_role("alert")).to_have_text("temperature: must be 0 to 100, not 1000.0")
    answering(page, events("so far", error={"message": "the engine has died", "code": None}))
    ask(page, "a")
    expect(page.get_by_role("alert")).to_have_text("the engine has died")
    assert page.locator("#answers .completion").text_content() == "aso far"
    answering(page, "data: {}")  # a stream without an end
    ask(page, "a")
    expect(page.get_by_role("alert")).to_have_text("The connection to the server was lost.")
    page.route("**/v1/completions", lambda route: route.abort())
    ask(page, "a")
    expect(page.get_by_role("alert")).to_have_text("The connection to the server was lost.")


def test_a_failed_chat_message_returns_to_its_field(page):
    page.get_by_text("Chat", exact=True).click()
    ask(page, "hello", temperature=1000)
    expect(page.get_by_role("alert")).to_contain_text("temperature")
    expect(page.locator("#input")).to_have_value("hello")
    expect(page.locator("#answers .message")).to_have_count(0)


def test_text_of_the_model_is_never_markup(page):
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    answering(page, events(text))
    finish(page, "<b>a</b>")
    assert page.locator("#answers .completion").text_content() == "<b>a</b>" + text
    assert not page.locator("#answers").locator("img, script, b").count()


def test_the_page_asks_for_a_key_and_keeps_it_for_the_tab(open_page, memory_server):
    def protect(page):
        def answer(route):
            if route.request.headers.get("authorization") == "Bearer open-sesame":
                route.continue_()
            else:
                error = {"error": {"message": "a key is needed"}}
                route.fulfill(status=401, json=error, headers={"WWW-Authenticate": "Bearer"})

        page.route("**/v1/**", answer)
        page.route("**/metrics", answer)

    page = open_page(memory_server.url, prepare=protect)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("a key is needed")
    assert_accessible(page)
    for key in ("wrong", "open-sesame"):
        page.fill("#key", key)
        page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#load")).to_have_text("ready")
    finish(page, "a", max_tokens=3)
    assert page.evaluate("() => [localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    expect(page.locator("#load")).to_have_text("ready")
    page.click("#key-button")
    page.click("#key-forget")
    ask(page, "a")
    expect(dialog).to_contain_text("a key is needed")
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert")).to_have_text("a key is needed")


@pytest.mark.parametrize("path", ["models", "memory"])
def test_rows_are_shown_even_if_the_tables_were_not_known_at_first(open_page, memory_server, path):
    # not the route's own ``times``: it may also answer a second request of the same moment
    failures = [503]

    def answer(route):
        if failures:
            route.fulfill(status=failures.pop(), body="")
        else:
            route.continue_()

    def fail_once(page):
        page.route(f"**/v1/{path}", answer)

    page = open_page(memory_server.url, prepare=fail_once)
    finish(page, "lookup", max_tokens=5, temperature=0)
    expect(page.locator("#layer-tables")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_is_accessible_and_fits_in_both_themes(open_page, memory_server, scheme, width):
    page = open_page(memory_server.url, width, scheme)
    expect(page.locator("#load")).to_have_text("ready")
    if width < 900:
        page.get_by_text("Sampling").click()
    finish(page, "lookup", max_tokens=20, temperature=0)
    expect(page.locator("#layer-tables")).to_be_visible()
    assert_accessible(page)
    assert_fits(page)
    finish(page, "x" * 150, max_tokens=5)
    answering(page, events("y" * 5000))
    finish(page, "x" * 500)
    assert_fits(page)


def test_the_switch_changes_the_colours_and_is_remembered(page):
    def background():
        return page.evaluate("() => getComputedStyle(document.body).backgroundColor")

    light = background()
    page.get_by_role("button", name="Use dark colours").click()
    dark = background()
    page.reload()
    assert background() == dark != light
    expect(page.get_by_role("button", name="Use light colours")).to_be_visible()


def test_it_works_below_a_path_of_a_proxy(open_page, memory_server):
    def forward(page):
        below = f"{memory_server.url}/some/path/"
        page.route(
            below + "**",
            lambda route: route.continue_(url=route.request.url.replace("/some/path/", "/")),
        )

    page = open_page(f"{memory_server.url}/some/path/", prepare=forward)
    expect(page.locator("#model")).to_have_text("tiny-memory")
    finish(page, "a", max_tokens=3)
    expect(page.locator("#load")).to_have_text("ready")


def test_a_lost_server_is_shown_until_it_answers_again(open_page, memory_server):
    page = open_page(memory_server.url, prepare=lambda page: page.clock.install())
    expect(page.locator("#load")).to_have_text("ready")
    page.route("**/metrics", lambda route: route.abort())
    page.clock.fast_forward(2000)
    expect(page.locator("#load")).to_have_text("unreachable")
    page.unroute("**/metrics")
    page.clock.fast_forward(8000)
    expect(page.locator("#load")).to_have_text("ready")
