// The feature browser: one layer and one latent at a time, which the address names as #layers.3/1234.
const $ = (id) => document.getElementById(id);
const LISTED = 200;
let shown = { layer: 0, latent: 0 };
let list = "densest";
let found = [];

const digits = (value) => (Number.isFinite(value) ? Number(value.toPrecision(3)).toString() : "–");
const percent = (share) => (share === 0 ? "0%" : `${digits(100 * share)}%`);
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "→");
const word = (place) => page.vocabulary[place];

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ---- which one

function parseAddress() {
  const [hookpoint, latent] = decodeURIComponent(location.hash.slice(1)).split("/");
  const layer = page.layers.findIndex((each) => each.hookpoint === hookpoint);
  return layer < 0 || latent === undefined ? null : { layer, latent: latent === "" ? null : Number(latent) };
}

async function go(layer, latent, scroll = false) {
  const arrays = await layerAt(layer);
  if (latent === null) latent = arrays.latents.values[densest(arrays)[0]];
  const changed = layer !== shown.layer || !$("feature").dataset.latent;
  shown = { layer, latent };
  history.replaceState(null, "", `#${page.layers[layer].hookpoint}/${latent}`);
  $("layer").selectedIndex = layer;
  $("latent").value = latent;
  $("latent").max = page.layers[layer].num_latents - 1;
  await showFeature(arrays, layer, latent);
  if (changed) {
    if (list === "found") await search();
    showList(arrays);
  }
  markCurrent();
  if (scroll) $("features").scrollIntoView();
}

async function step(by) {
  const { latents } = await layerAt(shown.layer);
  const count = latents.values.length;
  // A latent without a page has no row of its own: go on from where it would stand.
  let place = latents.values.findIndex((latent) => latent >= shown.latent);
  if (place < 0) place = count;
  if (by > 0 && latents.values[place] !== shown.latent) place -= 1;
  await go(shown.layer, latents.values[(place + by + count) % count]);
}

async function otherLayer(by) {
  const layer = (shown.layer + by + page.layers.length) % page.layers.length;
  await go(layer, Math.min(shown.latent, page.layers[layer].num_latents - 1));
}

async function anyLatent() {
  const { latents, counts } = await layerAt(shown.layer);
  // Never the one that is shown: a key that changes nothing looks broken.
  const others = [...latents.values.keys()].filter(
    (place) => counts.values[place] > 0 && latents.values[place] !== shown.latent,
  );
  if (others.length) await go(shown.layer, latents.values[others[Math.floor(Math.random() * others.length)]]);
}

// ---- one latent

async function showFeature(arrays, layer, latent) {
  const article = $("feature");
  const place = arrays.rowOf.get(latent);
  const title = make("h3", { textContent: `${page.layers[layer].hookpoint} / ${latent}` });
  article.dataset.latent = latent;
  article.dataset.layer = page.layers[layer].hookpoint;
  if (place === undefined) {
    const inside = latent >= 0 && latent < page.layers[layer].num_latents;
    const reason = inside ? "This latent is not among those that the report shows (saekit report --latents N for more)."
      : `This layer has latents 0 to ${page.layers[layer].num_latents - 1}.`;
    article.replaceChildren(title, make("p", { className: "note", textContent: reason }));
  } else {
    const text = (await part("text")).ids;
    const reason = page.layers[layer].no_lens;
    const note = reason ? [make("p", { className: "note", textContent: `What a latent promotes is not known at this hookpoint: ${reason}.` })] : [];
    article.replaceChildren(title, facts(arrays, place), columns(arrays, place), ...note, ...contexts(arrays, place, text));
  }
  article.setAttribute("aria-busy", "false");
}

function facts(arrays, place) {
  const count = arrays.counts.values[place];
  const box = make("dl", { className: "facts" });
  const add = (name, value) => box.append(make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })));
  add("Fires on", count ? `${percent(count / page.layers[shown.layer].tokens)} of tokens` : "no token: dead");
  box.lastChild.title = `${count} of ${page.layers[shown.layer].tokens} tokens`;
  if (count) {
    row(arrays.quantiles, place).forEach((value, i) => {
      const share = page.quantiles[i];
      add(share === 1 ? "Strongest" : share === 0.5 ? "Median activation" : `${100 * share}% below`, digits(value));
    });
  }
  return box;
}

function columns(arrays, place) {
  const box = make("div", { className: "columns" });
  const add = (title, items) => items.length && box.append(make("div", {}, make("h3", { textContent: title }), make("ol", {}, ...items)));
  const tokens = (name, values, format, down = false) => {
    if (!arrays[name]) return [];
    const amounts = [...row(arrays[values], place)];
    const most = Math.max(...amounts.map(Math.abs));
    return [...row(arrays[name], place)].flatMap((token, i) => {
      if (token < 0) return [];
      const item = make("li", { className: down ? "down" : "" }, make("span", { className: "token", textContent: visible(word(token)) }), make("span", { textContent: format(amounts[i]) }));
      item.style.setProperty("--share", percent(most ? Math.abs(amounts[i]) / most : 0));
      return [item];
    });
  };
  add("Fires most often on", tokens("favorites", "shares", percent));
  add("Promotes", tokens("promoted", "rises", digits));
  add("Suppresses", tokens("suppressed", "falls", digits, true));
  const parts = page.layers[shown.layer].parts;
  if (parts.length) {
    const norms = [...row(arrays.norms, place)];
    const most = Math.max(...norms);
    add("Decoder norm at", parts.map((name, i) => {
      const item = make("li", {}, make("span", { textContent: name }), make("span", { textContent: digits(norms[i]) }));
      item.style.setProperty("--share", percent(most ? norms[i] / most : 0));
      return item;
    }));
  }
  const cosines = row(arrays.cosines, place);
  add("Nearest in the decoder", [...row(arrays.neighbours, place)].map((latent, i) => {
    const button = make("button", { type: "button", textContent: latent });
    button.addEventListener("click", () => go(shown.layer, latent));
    const item = make("li", {}, button, make("span", { textContent: digits(cosines[i]) }));
    item.style.setProperty("--share", percent(Math.max(0, cosines[i])));
    return item;
  }));
  return box;
}

function contexts(arrays, place, text) {
  const places = row(arrays.places, place);
  const acts = row(arrays.acts, place);
  const number = places.length;
  const windowLength = arrays.shades.width / number;
  const shades = row(arrays.shades, place);
  const items = (from, to) => {
    const some = [];
    for (let i = from; i < to; i++) {
      if (places[i] >= 0) some.push(context(places[i], acts[i], shades.subarray(i * windowLength, (i + 1) * windowLength), arrays, place, text));
    }
    return some;
  };
  const parts = [];
  const add = (title, some) => some.length && parts.push(make("h3", { textContent: title }), make("ol", { className: "contexts" }, ...some));
  add("Strongest", items(0, page.top));
  add("Weaker, over the whole range", items(page.top, number));
  return parts;
}

function context(peak, act, shades, arrays, place, text) {
  const largest = row(arrays.quantiles, place).at(-1);
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
    line.append(token);
  });
  if (peak - page.before + shades.length < (sequence + 1) * length) line.append(make("span", { className: "end", textContent: "…" }));
  return make("li", {}, make("span", { className: "act", textContent: digits(act) }), line);
}

// ---- lists

const byCount = (arrays, sign) => [...arrays.latents.values.keys()].filter((i) => arrays.counts.values[i] > 0)
  .sort((a, b) => sign * (arrays.counts.values[a] - arrays.counts.values[b]));
const densest = (arrays) => { const order = byCount(arrays, -1); return order.length ? order : [0]; };

const LISTS = {
  densest: (arrays) => ({ entries: byCount(arrays, -1).slice(0, LISTED).map((i) => entry(arrays, i)) }),
  rarest: (arrays) => ({ entries: byCount(arrays, 1).slice(0, LISTED).map((i) => entry(arrays, i)) }),
  similar: (arrays) => {
    const seen = new Set();
    const pairs = [];
    const order = [...arrays.latents.values.keys()].filter(() => arrays.cosines.width > 0)
      .sort((a, b) => row(arrays.cosines, b)[0] - row(arrays.cosines, a)[0]);
    for (const i of order) {
      const pair = [arrays.latents.values[i], row(arrays.neighbours, i)[0]];
      const key = [...pair].sort((a, b) => a - b).join();
      if (seen.has(key)) continue;
      seen.add(key);
      pairs.push({ latent: pair[0], label: `${pair[0]} and ${pair[1]}`, value: digits(row(arrays.cosines, i)[0]) });
      if (pairs.length === LISTED) break;
    }
    return { entries: pairs, note: "Pairs of decoder rows, by their cosine." };
  },
  dead: (arrays) => {
    const silent = [...arrays.silent.values];
    const note = silent.length ? `${silent.length} of ${page.layers[shown.layer].num_latents} fired on none of the tokens.` : "Every latent fired on some token.";
    return { entries: silent.slice(0, LISTED).map((latent) => ({ latent, label: latent, value: "" })), note };
  },
  found: () => ({ entries: found, note: found.length ? `By the share of their firings on the token${page.has_lens ? ", then by how much they promote it" : ""}.` : "No latent of this layer has such a token among its first." }),
};

function entry(arrays, place) {
  const latent = arrays.latents.values[place];
  const favorite = row(arrays.favorites, place)[0];
  return { latent, label: latent, token: favorite < 0 ? "" : visible(word(favorite)), value: percent(arrays.counts.values[place] / page.layers[shown.layer].tokens) };
}

function showList(arrays) {
  const { entries, note } = LISTS[list](arrays);
  $("list").replaceChildren(...entries.map(({ latent, label, token, value }) => {
    const button = make("button", { type: "button" }, make("span", { textContent: label }));
    if (token !== undefined) button.append(make("span", { className: "token", textContent: token }));
    button.append(make("span", { textContent: value }));
    button.dataset.latent = latent;
    button.addEventListener("click", () => go(shown.layer, latent));
    return make("li", {}, button);
  }));
  $("list-note").textContent = note ?? `By the share of tokens on which they fire${entries.length === LISTED ? `; the first ${LISTED}` : ""}.`;
  document.querySelectorAll("[data-list]").forEach((tab) => tab.setAttribute("aria-selected", tab.dataset.list === list));
  markCurrent();
}

function markCurrent() {
  for (const button of $("list").querySelectorAll("button")) button.setAttribute("aria-current", Number(button.dataset.latent) === shown.latent);
}

async function choose(name) {
  list = name;
  showList(await layerAt(shown.layer));
}

// A token is meant if its text is the query, spaces at its ends and case aside; without one, tokens that begin so.
async function search() {
  const query = $("query").value.trim().toLowerCase();
  const tab = document.querySelector('[data-list="found"]');
  tab.hidden = query === "";
  found = [];
  if (query === "") return;
  const same = new Set();
  const alike = new Set();
  page.vocabulary.forEach((text, place) => {
    const plain = text.trim().toLowerCase();
    if (plain === query) same.add(place);
    else if (plain.startsWith(query)) alike.add(place);
  });
  const wanted = same.size ? same : alike;
  const arrays = await layerAt(shown.layer);
  const hits = [];
  for (let i = 0; i < arrays.latents.values.length; i++) {
    let share = 0;
    let token = -1;
    row(arrays.favorites, i).forEach((favorite, j) => {
      if (!wanted.has(favorite)) return;
      share += row(arrays.shares, i)[j];
      if (token < 0) token = favorite;
    });
    const promoted = arrays.promoted ? row(arrays.promoted, i).findIndex((each) => wanted.has(each)) : -1;
    if (token < 0 && promoted < 0) continue;
    const rise = promoted < 0 ? 0 : row(arrays.rises, i)[promoted];
    const word_ = word(token < 0 ? row(arrays.promoted, i)[promoted] : token);
    hits.push({ latent: arrays.latents.values[i], label: arrays.latents.values[i], token: visible(word_), value: token < 0 ? `promotes ${digits(rise)}` : percent(share), share, rise });
  }
  hits.sort((a, b) => b.share - a.share || b.rise - a.rise);
  found = hits.slice(0, LISTED);
}

// ---- what the reader does

$("pick").addEventListener("submit", (event) => event.preventDefault());
$("layer").addEventListener("change", () => otherLayer($("layer").selectedIndex - shown.layer));
$("latent").addEventListener("change", () => $("latent").value !== "" && go(shown.layer, Math.trunc(Number($("latent").value))));
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("random").addEventListener("click", anyLatent);
$("help").addEventListener("click", () => $("keys").showModal());
$("search").addEventListener("submit", (event) => event.preventDefault());
$("query").addEventListener("input", async () => {
  await search();
  await choose($("query").value.trim() === "" ? "densest" : "found");
});
document.querySelectorAll("[data-list]").forEach((tab) => tab.addEventListener("click", () => choose(tab.dataset.list)));

const KEYS = {
  ArrowLeft: () => step(-1), k: () => step(-1), ArrowRight: () => step(1), j: () => step(1),
  "[": () => otherLayer(-1), "]": () => otherLayer(1), r: anyLatent, t: switchTheme,
  "/": () => { $("features").scrollIntoView(); $("query").focus(); }, "?": () => $("keys").showModal(),
};
document.addEventListener("keydown", (event) => {
  const inField = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape" && inField) event.target.blur();
  if (inField || event.ctrlKey || event.metaKey || event.altKey || $("keys").open || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

window.addEventListener("hashchange", () => {
  const asked = parseAddress();
  if (asked) go(asked.layer, asked.latent, true);
});

const asked = parseAddress();
go(asked?.layer ?? 0, asked?.latent ?? null, asked !== null);
