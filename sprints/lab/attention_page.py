"""A page in which one points at a token and sees where each head looks from there. One file, no network.

    html = page(title, text, [Example("seven letters", tokens, {"layer 1, head 1": weights, …}), …])
    read(html)                                        # the examples as the page holds them, in percent

Derived in: 06_attention/06_what_heads_learn
"""

import html
import json
import re
from dataclasses import dataclass
from string import Template

from torch import Tensor


@dataclass
class Example:
    """A text of T tokens, and for each head the weights (T, T) with which the row looks at the column.

    With causal=True what comes after a token is shown as hidden from it.
    """

    name: str
    tokens: list[str]
    heads: dict[str, Tensor]
    causal: bool = True


def page(title: str, text: str, examples: list[Example]) -> str:
    """The page as HTML; weights are rounded to whole percents."""
    data = [
        {
            "name": example.name,
            "tokens": example.tokens,
            "heads": {name: _rows(weights, example.causal) for name, weights in example.heads.items()},
        }
        for example in examples
    ]
    inside_script = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.substitute(title=html.escape(title), text=html.escape(text), data=inside_script)


def read(page: str) -> list[dict]:
    """What page(…) was given: [{"name": …, "tokens": […], "heads": {name: [[percent, …], …]}}, …]."""
    return json.loads(re.findall(r'<script id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[0])


def _rows(weights: Tensor, causal: bool) -> list[list[int]]:
    """Whole percents, row by row; a causal row ends at its own place."""
    rows = weights.mul(100).round().int().tolist()
    return [row[: t + 1] if causal else row for t, row in enumerate(rows)]


TEMPLATE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark;
  --page: #fff; --ink: #1b1b1f; --quiet: #62626c; --line: #d8d8de; --card: #f6f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --page: #17171a; --ink: #ececf0; --quiet: #a2a2ad; --line: #3c3c44; --card: #202024 } }
body { margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 }
p { margin: .4rem 0 1rem; max-width: 46rem }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin-bottom: 1rem }
nav button { font: inherit; padding: .15rem .8rem; border: 1px solid var(--line); border-radius: 1rem;
  background: none; color: inherit; cursor: pointer }
nav button[aria-pressed=true] { background: var(--ink); color: var(--page) }
.tokens { display: flex; flex-wrap: wrap; gap: .15rem }
.token { font: inherit; min-width: 1.9rem; box-sizing: border-box; padding: .1rem .2rem; text-align: center;
  color: inherit; background: none; border: 1px solid var(--line); border-radius: .3rem; cursor: pointer }
#text .token { min-width: 2.1rem; padding: .3rem }
.token.here { outline: 3px solid #0b84c6; outline-offset: -1px }
.token.hidden { opacity: .35 }
.weight { display: block; height: 1.1rem; font-size: .72rem; line-height: 1.1rem;
  font-variant-numeric: tabular-nums }
#heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: .8rem }
section { background: var(--card); border-radius: .5rem; padding: .6rem .8rem .8rem }
h2 { font-size: 1rem; margin: 0 0 .4rem; display: flex; flex-wrap: wrap; justify-content: space-between }
h2 span { font-weight: normal; color: var(--quiet) }
#says { color: var(--quiet); margin: .5rem 0 1rem }
</style>
</head>
<body>
<h1>$title</h1>
<p>$text</p>
<nav id="examples" aria-label="Texts"></nav>
<div id="text" class="tokens" role="group" aria-label="The text; arrow keys move"></div>
<div id="says" aria-live="polite"></div>
<main id="heads"></main>
<script id="data" type="application/json">$data</script>
<script>
"use strict";
const examples = JSON.parse(document.getElementById("data").textContent);
const [nav, strip, says, main] = ["examples", "text", "says", "heads"].map(id => document.getElementById(id));
let example;

function make(tag, parent, text, classes) {
  const made = parent.appendChild(document.createElement(tag));
  if (text !== undefined) made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

function tokens(parent, tag, each) {
  example.tokens.forEach((token, place) => {
    const made = make(tag, parent, token, "token");
    made.dataset.place = place;
    each(made);
  });
}

function open(number) {  // one of the texts
  example = examples[number];
  [...nav.children].forEach((button, i) => button.setAttribute("aria-pressed", i === number));
  strip.replaceChildren();
  main.replaceChildren();
  tokens(strip, "button", button => button.type = "button");
  for (const name in example.heads) {
    const head = make("section", main);
    head.dataset.head = name;
    make("span", make("h2", head, name));
    tokens(make("div", head, undefined, "tokens"), "div", cell => make("span", cell, "", "weight"));
  }
  show(Math.floor(example.tokens.length * 0.75));
}

function show(here) {  // where each head looks from the token at this place
  says.textContent = "From " + example.tokens[here] + " at place " + here + ", in percent:";
  document.querySelectorAll(".token").forEach(token =>
    token.classList.toggle("here", Number(token.dataset.place) === here));
  [...strip.children].forEach((button, place) => button.tabIndex = place === here ? 0 : -1);
  for (const head of main.children) {
    const row = example.heads[head.dataset.head][here], most = row.indexOf(Math.max(...row));
    head.querySelector("h2 span").textContent =
      row[most] + " % at " + example.tokens[most] + ", place " + most;
    head.querySelectorAll(".token").forEach((token, place) => {
      const seen = place < row.length, weight = seen ? row[place] : 0;
      token.classList.toggle("hidden", !seen);
      token.style.background = weight ? "rgb(245 158 11 / " + weight + "%)" : "none";
      token.style.color = weight > 65 ? "#000" : "inherit";
      token.lastChild.textContent = seen ? weight : "";
    });
  }
}

function point(event) {
  const token = event.target.closest("[data-place]");
  if (token) show(Number(token.dataset.place));
}

["mouseover", "focusin", "click"].forEach(kind => document.addEventListener(kind, point));
strip.addEventListener("keydown", event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  const next = step && strip.children[Number(event.target.dataset.place) + step];
  if (!next) return;
  next.focus();
  show(Number(next.dataset.place));
});
examples.forEach((each, number) => make("button", nav, each.name).onclick = () => open(number));
open(0);
</script>
</body>
</html>
""")
