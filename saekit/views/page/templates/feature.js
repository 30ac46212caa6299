// One latent: its facts, histogram, tokens, neighbors and contexts.
const $ = (id) => document.getElementById(id);
const digits = (value) => (Number.isFinite(value) ? Number(value.toPrecision(3)).toString() : "–");
const percent = (share) => (share === 0 ? "0%" : `${digits(100 * share)}%`);
const count = (number) => number.toLocaleString("en-US");
const tokens = (number) => `${count(number)} ${number === 1 ? "token" : "tokens"}`;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "→");
const word = (place) => page.vocabulary[place];

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function showFeature(layer, latent, place) {
  const title = make("h3", { textContent: `${page.layers[layer].hookpoint} / ${latent}` });
  const parts = [make("div", { className: "title" }, title, copyButton())];
  if (place < 0) {
    const inside = latent >= 0 && latent < page.layers[layer].num_latents;
    const reason = inside ? "This latent is not in the report's sample. Use saekit report --latents N to include more."
      : `This layer has latents 0 to ${page.layers[layer].num_latents - 1}.`;
    parts.push(make("p", { className: "note", textContent: reason }));
  } else {
    const [own, text] = await Promise.all([source.row(layer, place), source.text()]);
    const reason = page.layers[layer].no_lens;
    parts.push(facts(own, layer), ...histogram(own), columns(own, layer));
    if (reason) parts.push(make("p", { className: "note", textContent: `What a latent promotes is unknown at this hookpoint: ${reason}.` }));
    parts.push(...contexts(own, text));
  }
  const article = $("feature");
  article.dataset.latent = latent;
  article.dataset.layer = page.layers[layer].hookpoint;
  article.replaceChildren(...parts);
  article.setAttribute("aria-busy", "false");
}

// ---- its link

function copyButton() {
  const button = make("button", { type: "button", id: "copy", title: "Copy a link to this latent (c)", textContent: "Copy link" });
  button.addEventListener("click", copyLink);
  return button;
}

async function copyLink() {
  const copied = await written(location.href);
  const button = $("copy");
  const said = copied ? "Copied" : "Not copied: the address bar has the link";
  button.textContent = said;
  $("said").textContent = copied ? "Link copied" : said;
  setTimeout(() => {
    if (button.textContent === said) button.textContent = "Copy link";
    $("said").textContent = "";
  }, 2000);
}

// Browsers differ in whether a page from a file may use the clipboard; the older way is for those that refuse.
async function written(link) {
  try {
    await navigator.clipboard.writeText(link);
    return true;
  } catch {
    const before = document.activeElement;
    const field = make("textarea", { value: link, readOnly: true, className: "aside" });
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    before?.focus();
    return done;
  }
}

// ---- its numbers

function facts(own, layer) {
  const fired = own.counts[0];
  const box = make("dl", { className: "facts" });
  const add = (name, value) => box.append(make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })));
  add("Fires on", fired ? `${percent(fired / page.layers[layer].tokens)} of tokens` : "no token: dead");
  box.lastChild.title = `${count(fired)} of ${tokens(page.layers[layer].tokens)}`;
  if (fired) {
    own.quantiles.forEach((value, i) => {
      const share = page.quantiles[i];
      add(share === 1 ? "Strongest" : share === 0.5 ? "Median activation" : `${100 * share}th percentile`, digits(value));
    });
  }
  return box;
}

function histogram(own) {
  const [low, high] = own.bounds;
  const bins = [...own.histogram];
  const most = Math.max(...bins);
  if (!most) return [];
  const edge = (i) => digits(low + ((high - low) * i) / bins.length);
  const bars = bins.map((number, i) => {
    const bar = make("span", { title: `${edge(i)} to ${edge(i + 1)}: ${tokens(number)}` });
    bar.style.setProperty("--share", percent(number / most));
    return bar;
  });
  const label = `Histogram of ${count(own.counts[0])} activations from ${digits(low)} to ${digits(high)}; the fullest bin, ${edge(bins.indexOf(most))} to ${edge(bins.indexOf(most) + 1)}, has ${tokens(most)}`;
  const axis = make("div", { className: "axis" }, make("span", { textContent: digits(low) }), make("span", { textContent: digits(high) }));
  axis.setAttribute("aria-hidden", "true");
  const box = make("div", { className: "bars" }, ...bars);
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", label);
  return [make("h3", { textContent: "Activations" }), make("div", { className: "histogram" }, box, axis),
    make("p", { className: "note", textContent: `The tokens on which it fires, in ${bins.length} bins of equal width. The highest bar is ${tokens(most)}.` })];
}

function columns(own, layer) {
  const box = make("div", { className: "columns" });
  const add = (title, items) => items.length && box.append(make("div", {}, make("h3", { textContent: title }), make("ol", {}, ...items)));
  const tokensOf = (name, values, format, down = false) => {
    if (!own[name]) return [];
    const amounts = [...own[values]];
    const most = Math.max(...amounts.map(Math.abs));
    return [...own[name]].flatMap((token, i) => {
      if (token < 0) return [];
      const item = make("li", { className: down ? "down" : "" }, make("span", { className: "token", textContent: visible(word(token)) }), make("span", { textContent: format(amounts[i]) }));
      item.style.setProperty("--share", percent(most ? Math.abs(amounts[i]) / most : 0));
      return [item];
    });
  };
  add("Fires most often on", tokensOf("favorites", "shares", percent));
  add("Promotes", tokensOf("promoted", "rises", digits));
  add("Suppresses", tokensOf("suppressed", "falls", digits, true));
  const parts = page.layers[layer].parts;
  if (parts.length) {
    const most = Math.max(...own.norms);
    add("Decoder norm at", parts.map((name, i) => {
      const item = make("li", {}, make("span", { textContent: name }), make("span", { textContent: digits(own.norms[i]) }));
      item.style.setProperty("--share", percent(most ? own.norms[i] / most : 0));
      return item;
    }));
  }
  add("Nearest in the decoder", [...own.neighbours].map((latent, i) => {
    const button = make("button", { type: "button", textContent: latent });
    button.addEventListener("click", () => go(layer, latent));
    const item = make("li", {}, button, make("span", { textContent: digits(own.cosines[i]) }));
    item.style.setProperty("--share", percent(Math.max(0, own.cosines[i])));
    return item;
  }));
  return box;
}

// ---- its contexts

function contexts(own, text) {
  const number = own.places.length;
  const windowLength = own.shades.length / number;
  const items = (from, to) => {
    const some = [];
    for (let i = from; i < to; i++) {
      if (own.places[i] >= 0) some.push(context(own, i, own.shades.subarray(i * windowLength, (i + 1) * windowLength), text));
    }
    return some;
  };
  const parts = [];
  const add = (title, some) => some.length && parts.push(make("h3", { textContent: title }), make("ol", { className: "contexts" }, ...some));
  add("Strongest", items(0, page.top));
  add("Weaker, over the whole range", items(page.top, number));
  return parts;
}

function context(own, number, shades, text) {
  const [peak, act, largest] = [own.places[number], own.acts[number], own.quantiles.at(-1)];
  const length = text.width;
  const sequence = Math.floor(peak / length);
  const line = make("div", { className: "context" });
  if (peak - page.before > sequence * length) line.append(make("span", { className: "end", textContent: "…" }));
  shades.forEach((shade, i) => {
    const here = peak - page.before + i;
    if (here < 0 || Math.floor(here / length) !== sequence) return;
    const token = make("span", { textContent: visible(word(text.values[here])) });
    if (shade) {
      token.style.setProperty("--a", (0.12 + 0.78 * shade / 255).toFixed(3));
      token.title = digits((largest * shade) / 255);
      if (shade > 140) token.classList.add("hot");
    }
    if (here === peak) {
      token.classList.add("peak");
      token.title = digits(act);
    }
    if (list === "found" && asked.matches?.[here]) token.classList.add("match");
    line.append(token);
  });
  if (peak - page.before + shades.length < (sequence + 1) * length) line.append(make("span", { className: "end", textContent: "…" }));
  return make("li", {}, make("span", { className: "act", textContent: digits(act) }), line);
}
