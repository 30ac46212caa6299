"""The report in a real Chromium: what it shows, and what happens on clicks and keys."""

import json
import re
from collections import Counter

import pytest

from tests.views.test_page import element, unpack

pytestmark = pytest.mark.slow

TITLE = "#feature .title h3"


def shown(page):
    hookpoint, latent = page.text_content(TITLE).split(" / ")
    return hookpoint, int(latent)


def wait_for(page, title):
    """The page forbids what a script in a string would need, so the driver looks at the text instead."""
    from playwright.sync_api import expect

    expect(page.locator(TITLE)).to_have_text(title)


def press(page, key):
    from playwright.sync_api import expect

    before = page.text_content(TITLE)
    page.keyboard.press(key)
    expect(page.locator(TITLE)).not_to_have_text(before)


def test_its_numbers_are_those_of_eval_json(open_page, evaluation):
    page = open_page()
    for layer in evaluation["layers"]:
        row = page.locator(f'#layer-table tr[data-layer="{layer["hookpoint"]}"]')
        for metric, value in (
            ("fvu", f"{layer['reconstruction']['fvu']['value']:.4f}"),
            ("dead", f"{layer['reconstruction']['dead']:,}"),
            ("ce_recovered", f"{layer['grafted']['ce_recovered']['value']:.4f}"),
            ("kl", f"{layer['grafted']['kl']['value']:.4f}"),
        ):
            assert row.locator(f'[data-metric="{metric}"]').inner_text().split()[0] == value
    together = page.locator('#layer-table tr[data-layer="all"] [data-metric="ce_recovered"]')
    assert together.inner_text().startswith(f"{evaluation['together']['ce_recovered']['value']:.4f}")


CHARTS = ["layer-fvu", "layer-ce", "layer-kl", "training-fvu", "held-out-fvu", "held-out-ce", "density", "similarity"]


def test_charts_are_drawn(open_either):
    page = open_either()
    for name in CHARTS:
        chart = page.locator(f'[data-chart="{name}"]')
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()
        assert chart.locator(".trace").count() == (1 if name.startswith("layer") else 2), name


def test_pick_a_latent(open_either):
    page = open_either()
    page.select_option("#layer", "layers.3")
    wait_for(page, re.compile(r"^layers\.3 / "))
    page.fill("#latent", "17")
    page.keyboard.press("Enter")
    wait_for(page, "layers.3 / 17")
    assert page.url.endswith("#layers.3/17")
    page.fill("#latent", "256")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=This layer has latents 0 to 255")


def test_an_address_of_a_latent(open_page):
    page = open_page("#layers.3/5")
    assert shown(page) == ("layers.3", 5)
    page.click("text=layers.0 >> nth=0")
    wait_for(page, re.compile(r"^layers\.0 / "))


def test_contexts_are_shaded_by_activation(open_page):
    page = open_page()  # the densest latent of the first layer
    strongest = page.locator(".contexts").first.locator("li").first
    peak = strongest.locator(".peak")
    assert peak.count() == 1
    assert peak.get_attribute("title") == strongest.locator(".act").inner_text()
    assert peak.evaluate("token => getComputedStyle(token).getPropertyValue('--a')") == "0.900"
    acts = [float(text) for text in page.locator(".contexts .act").all_inner_texts()]
    assert acts == sorted(acts, reverse=True)
    assert acts[0] == float(page.locator("#feature .facts dd").last.inner_text())


def test_the_histogram_counts_the_tokens_on_which_it_fires(open_page):
    page = open_page()
    bars = page.locator("#feature .bars span")
    titles = bars.evaluate_all("bars => bars.map(bar => bar.title)")
    fired = page.locator("#feature .facts > div").first.get_attribute("title")
    counts = [int(title.split(": ")[1].split()[0].replace(",", "")) for title in titles]
    assert len(counts) == 20
    assert sum(counts) == int(fired.split(" of ")[0].replace(",", ""))
    heights = bars.evaluate_all("bars => bars.map(bar => parseFloat(bar.style.getPropertyValue('--share')))")
    assert heights == pytest.approx([100 * count / max(counts) for count in counts], rel=0.01)
    strongest = page.locator("#feature .facts dd").last.inner_text()
    assert titles[-1].startswith(f"{titles[-1].split(' to ')[0]} to {strongest}: ")
    assert f"to {strongest};" in page.get_attribute("#feature .bars", "aria-label")


@pytest.mark.parametrize("by", ["click", "key", "enter"])
def test_a_link_to_the_latent_is_copied(open_page, by):
    page = open_page("#layers.3/5")
    if by == "click":
        page.click("#copy")
    elif by == "key":
        page.keyboard.press("c")
    else:
        page.focus("#copy")
        page.keyboard.press("Enter")
    page.wait_for_selector('#copy:has-text("Copied")')
    assert page.inner_text("#said") == "Link copied"
    page.focus("#quote")
    page.keyboard.press("Control+V")
    assert page.input_value("#quote") == page.url
    assert page.url.endswith("#layers.3/5")


def test_a_link_is_copied_where_the_clipboard_is_refused(open_page):
    page = open_page("#layers.3/5")
    page.evaluate("() => { navigator.clipboard.writeText = async () => { throw new Error(); }; }")
    page.focus("#copy")
    page.keyboard.press("Enter")
    page.wait_for_selector('#copy:has-text("Copied")')
    assert page.evaluate("document.activeElement.id") == "copy"
    page.focus("#quote")
    page.keyboard.press("Control+V")
    assert page.input_value("#quote") == page.url


def having(file, text):
    """By latent of the first layer, how many of its contexts contain a text in small letters: each read by itself."""
    page = file.read_text("utf-8")
    data, ids = json.loads(element(page, "data")), unpack(element(page, "text"))["ids"]
    words, (_, length) = data["vocabulary"], ids.shape
    found = Counter()
    for latent, places in enumerate(unpack(element(page, "layer-0"))["places"]):
        for place in places[places >= 0].tolist():
            sequence, here = divmod(place, length)
            window = ids[sequence, max(0, here - data["before"]) : here + data["after"] + 1]
            found[latent] += text in "".join(words[token] for token in window).lower()
    return +found


def test_search_in_contexts(open_either, made):
    page = open_either()
    hits = having(made[0], "return x + 1")
    page.keyboard.press("s")
    page.keyboard.type("Return X + 1")
    page.wait_for_selector('#list[data-query="Return X + 1"] button')
    assert page.inner_text("#list-note").startswith(f"{len(hits)} latents, ")
    for button in page.locator("#list button").all()[:20]:
        latent = int(button.get_attribute("data-latent"))
        assert button.inner_text().split()[1] == str(hits[latent])
    counts = [int(text.split()[1]) for text in page.locator("#list button").all_inner_texts()]
    assert counts == sorted(hits.values(), reverse=True)[:200]
    page.locator("#list button").first.click()
    page.wait_for_selector("#feature .match")
    page.select_option("#layer", "layers.3")
    wait_for(page, re.compile(r"^layers\.3 / "))
    page.fill("#quote", "no such text")
    page.wait_for_selector("text=The report's text does not contain it.")
    assert page.locator("#feature .match").count() == 0
    page.fill("#quote", "")
    page.wait_for_selector('[data-list="densest"][aria-pressed=true]')


def test_a_server_that_has_ended_is_named(chromium, server):
    context = chromium.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#feature[aria-busy=false]")
    page.route("**/rows/*", lambda route: route.abort())
    page.keyboard.press("j")
    page.wait_for_selector("text=The server does not answer. Start saekit report --serve again")
    context.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_axe_finds_nothing(open_page, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    page.fill("#quote", "return")
    page.wait_for_selector("#feature .match")
    for part in ("layers", "training", "densities", "features"):
        page.evaluate(f"document.getElementById('{part}').scrollIntoView()")
    page.locator('[data-chart="similarity"] .main-svg').first.wait_for()
    assert axe.Axe().run(page).response["violations"] == []


def test_next_previous_and_layers_by_key(open_page):
    page = open_page("#layers.0/10")
    for key, wanted in (
        ("j", ("layers.0", 11)),
        ("ArrowRight", ("layers.0", 12)),
        ("k", ("layers.0", 11)),
        ("ArrowLeft", ("layers.0", 10)),
        ("]", ("layers.3", 10)),
        ("[", ("layers.0", 10)),
    ):
        press(page, key)
        assert shown(page) == wanted
    page.click("#next")
    wait_for(page, "layers.0 / 11")
    press(page, "r")
    assert page.locator("#feature .contexts li").count() > 0


@pytest.mark.parametrize("chance", [0.0, 0.999])
def test_a_random_latent_is_never_the_one_shown(open_page, chance):
    page = open_page()
    page.evaluate("chance => { Math.random = () => chance; }", chance)
    press(page, "r")  # the first of the choices, or the last: it would be chosen again
    press(page, "r")
    assert page.locator("#feature .contexts li").count() > 0


def test_from_the_last_to_the_first(open_page):
    page = open_page("#layers.0/255")
    press(page, "j")
    assert shown(page) == ("layers.0", 0)
    press(page, "k")
    assert shown(page) == ("layers.0", 255)


def test_search_by_token(open_either):
    page = open_either()
    page.keyboard.press("/")
    page.keyboard.type("return")
    page.wait_for_selector('#list button:has-text("return")')
    assert page.get_attribute('[data-list="found"]', "aria-pressed") == "true"
    values = [
        float(text.split()[-1].rstrip("%"))
        for text in page.locator("#list button").all_inner_texts()
        if text.endswith("%")
    ]
    assert values == sorted(values, reverse=True)
    page.locator("#list button").first.click()
    first = int(page.locator("#list button").first.get_attribute("data-latent"))
    wait_for(page, f"layers.0 / {first}")
    lists = page.locator("#feature .columns ol")
    assert any("return" in lists.nth(i).inner_text() for i in range(2))
    page.fill("#query", "no such token at all")
    page.wait_for_selector("text=No latent of this layer has such a token")
    page.fill("#query", "")
    page.wait_for_selector('[data-list="densest"][aria-pressed=true]')


def test_lists(open_either, evaluation):
    page = open_either()
    dead = evaluation["layers"][0]["reconstruction"]["dead"]
    page.click('[data-list="dead"]')
    assert page.inner_text("#list-note").startswith(f"{dead} of 256" if dead else "Every latent")
    assert page.locator("#list button").count() == min(dead, 200)
    if dead:
        page.locator("#list button").first.click()
        page.wait_for_selector("text=no token: dead")
    page.click('[data-list="similar"]')
    cosines = [float(text.split()[-1]) for text in page.locator("#list button").all_inner_texts()]
    assert cosines == sorted(cosines, reverse=True)
    pair = page.locator("#list button").first
    one, other = pair.locator("span").first.inner_text().split(" and ")
    pair.click()
    wait_for(page, f"layers.0 / {one}")
    neighbour = page.locator("#feature .columns > div").last.locator("button").first
    assert neighbour.inner_text() == other
    neighbour.click()
    wait_for(page, f"layers.0 / {other}")
    for name, order in (("densest", True), ("rarest", False)):
        page.click(f'[data-list="{name}"]')
        shares = [float(text.split()[-1].rstrip("%")) for text in page.locator("#list button").all_inner_texts()]
        assert shares == sorted(shares, reverse=order)


def test_light_and_dark(open_page):
    color = "getComputedStyle(document.body).backgroundColor"
    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    assert light.evaluate(color) != dark.evaluate(color)
    light.keyboard.press("t")
    assert light.evaluate(color) == dark.evaluate(color)
    dark.click("#theme")
    light.keyboard.press("t")
    assert light.evaluate(color) == dark.evaluate(color)


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_runs_off_the_side(open_page, width):
    page = open_page(viewport={"width": width, "height": 800}, is_mobile=width < 1000, has_touch=width < 1000)
    for part in ("layers", "training", "densities", "features"):
        page.evaluate(f"document.getElementById('{part}').scrollIntoView()")
        page.wait_for_timeout(150)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_keys_are_explained(open_page):
    page = open_page()
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#keys").is_visible()
