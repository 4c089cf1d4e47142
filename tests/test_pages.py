"""The pages under results: one file each, no network, and in a browser they show the weights that they hold.

A browser is used where one is installed; where none is, those tests are skipped.
"""

import json
import re
import shutil
import subprocess

from lab.attention_page import Example, page, read

import course
import pytest
import torch

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
WITH_PAGE = [script for script in course.LESSONS if any(file.endswith(".html") for file in script.writes)]
COMMITTED = sorted((course.ROOT / "results").glob("*/*.html"))
HOSTILE = ["</script>", '"', "<b>&", "É", "$data", "\\u003c", " "]  # as tokens

# Points at every token in every way there is, and writes down what each head then shows.
PROBE = """
<script>
const broken = [], seen = [];
window.onerror = message => broken.push(message);
</script>
<script>
function focused(token) {  // a window that is not in front may keep the event to itself
  token.focus();
  if (document.activeElement === token) token.dispatchEvent(new FocusEvent("focusin", {bubbles: true}));
}
function shown() {
  return [...document.querySelectorAll("[data-head]")].map(head => [head.dataset.head,
    [...head.querySelectorAll(".token")].filter(token => !token.classList.contains("hidden"))
      .map(token => Number(token.querySelector(".weight").textContent))]);
}
[...document.querySelectorAll("#examples button")].forEach((button, example) => {
  button.click();
  const strip = () => [...document.querySelectorAll("#text .token")];
  strip().forEach((_, place) => {
    const elsewhere = strip()[place ? 0 : strip().length - 1];
    const ways = {
      hover: () => strip()[place].dispatchEvent(new MouseEvent("mouseover", {bubbles: true})),
      tap: () => strip()[place].click(),
      focus: () => focused(strip()[place]),
      head: () => document.querySelectorAll("[data-head] .token .weight")[place]
        .dispatchEvent(new MouseEvent("mouseover", {bubbles: true})),
    };
    for (const way in ways) {
      elsewhere.click();
      ways[way]();
      seen.push([example, place, way, shown()]);
    }
  });
  strip()[0].focus();
  strip()[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
  seen.push([example, 1, "arrow", shown()]);
});
const told = document.body.appendChild(document.createElement("pre"));
told.id = "told";
told.textContent = JSON.stringify({broken, seen});
</script>
"""


def check_alone(text: str) -> None:
    """Nothing outside the file is asked for, and it is not too large."""
    assert len(text.encode()) < course.MOST_BYTES[".html"]
    assert '<meta charset="utf-8">' in text[:1024]
    without_data = re.sub(r'<script id="data".*?</script>', "", text, flags=re.DOTALL)
    for way in (
        r"https?:",
        r"\bsrc\s*=",
        r"\bhref\s*=",
        r"url\(",
        r"@import",
        r"\bfetch\(",
        r"XMLHttp",
        r"<link",
    ):
        assert not re.search(way, without_data, re.IGNORECASE), f"the page may ask for something: {way}"


def check_in_browser(text: str, tmp_path) -> None:
    """Whatever way one points at a token, every head shows that token's row, and no script fails."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: looked for {', '.join(BROWSERS)}")
    first, second = PROBE.split("</script>\n", 1)
    copy = tmp_path / "page.html"
    copy.write_text(
        text.replace("<body>", f"<body>{first}</script>", 1).replace("</body>", f"{second}</body>"),
        encoding="utf-8",
    )
    quiet = (
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    )
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", *quiet,
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    dumped = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    (told,) = re.findall(r'<pre id="told">(.*?)</pre>', dumped.stdout, re.DOTALL) or [dumped.stderr]
    told = json.loads(told.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert not told["broken"], told["broken"]
    wanted = []
    for number, example in enumerate(read(text)):
        rows = [
            [[head, rows[t]] for head, rows in example["heads"].items()]
            for t in range(len(example["tokens"]))
        ]
        for t, row in enumerate(rows):
            wanted += [[number, t, way, row] for way in ("hover", "tap", "focus", "head")]
        wanted.append([number, 1, "arrow", rows[1]])
    assert told["seen"] == wanted


def made() -> str:
    """A page of two small texts, with what could be mistaken for code in it."""
    draw = torch.Generator().manual_seed(0)
    T = len(HOSTILE)
    causal = torch.randn(2, T, T, generator=draw).masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf)
    heads = {f"<{name}> & co": weights for name, weights in zip("ab", causal.softmax(-1), strict=True)}
    full = {"looks anywhere": torch.randn(T, T, generator=draw).softmax(-1)}
    return page(
        "<i>'&", "$text", [Example("</script>", HOSTILE, heads), Example("2", HOSTILE, full, causal=False)]
    )


def test_what_is_put_in_is_read_out():
    example, other = read(made())
    assert example["name"] == "</script>"
    assert example["tokens"] == HOSTILE
    assert [len(row) for row in example["heads"]["<a> & co"]] == [1, 2, 3, 4, 5, 6, 7]
    assert {len(row) for row in other["heads"]["looks anywhere"]} == {7}
    assert example["heads"]["<a> & co"][0] == [100]
    assert "<title>&lt;i&gt;&#x27;&amp;</title>" in made()


def test_made_page(tmp_path):
    check_alone(made())
    check_in_browser(made(), tmp_path)


@pytest.mark.parametrize("file", [pytest.param(file, id=file.stem) for file in COMMITTED])
def test_committed_page(file, tmp_path):
    text = file.read_text(encoding="utf-8")
    check_alone(text)
    check_in_browser(text, tmp_path)


@pytest.mark.parametrize(("script", "device"), course.each([(script, "cpu") for script in WITH_PAGE]))
def test_page_of_a_run(script, device, ran, tmp_path):
    (file,) = ran(script, device).results.rglob("*.html")
    text = file.read_text(encoding="utf-8")
    check_alone(text)
    check_in_browser(text, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".heads[head.dataset.head][here]", ".heads[head.dataset.head][0]"),  # always the first row
        ('"mouseover", ', ""),
        ('"focusin", ', ""),
        ("seen ? weight : ", "seen ? weight + 1 : "),
        ("open(0);\n", "open(0); nothing();\n"),  # a script error
        ("Number(token.dataset.place) === here", "Number(token.dataset.place) === here && nothing()"),
    ],
)
def test_a_broken_page_is_found(old, new, only_full, tmp_path):
    spoilt = made().replace(old, new)
    assert spoilt != made()
    with pytest.raises(AssertionError):
        check_in_browser(spoilt, tmp_path)
