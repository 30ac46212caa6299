// Lists of latents, and the two searches that make one.
const LISTED = 200;
const NONE = { entries: [], note: "" };
let list = "densest";
let found = NONE;
const asked = { query: "", of: null, matches: null }; // the search whose result is shown

// Places of the latents that fire: the rarest first, or with sign -1 the densest. One number says count and place,
// because numbers sort many times faster than places by a comparison.
const byCount = once(async (layer, sign) => {
  const { values } = (await source.columns(layer, ["counts"])).counts;
  const keys = new Float64Array(values.length);
  let firing = 0;
  values.forEach((number, place) => {
    if (number > 0) keys[firing++] = (sign > 0 ? number : 2 ** 31 - number) * values.length + place;
  });
  return [...keys.subarray(0, firing).sort()].map((key) => key % values.length);
});

async function densest(layer) {
  const order = await byCount(layer, -1);
  return order.length ? order[0] : 0;
}

async function countList(layer, sign) {
  const { latents, counts, favorites } = await source.columns(layer, ["latents", "counts", "favorites"]);
  const entries = (await byCount(layer, sign)).slice(0, LISTED).map((i) => {
    const favorite = row(favorites, i)[0];
    const latent = latents.values[i];
    return { latent, label: latent, token: favorite < 0 ? "" : visible(word(favorite)), value: percent(counts.values[i] / page.layers[layer].tokens) };
  });
  return { entries, note: `Sorted by the share of tokens on which they fire${entries.length === LISTED ? `; the first ${LISTED}` : ""}.` };
}

const LISTS = {
  densest: (layer) => countList(layer, -1),
  rarest: (layer) => countList(layer, 1),
  async similar(layer) {
    const { latents, cosines, neighbours } = await source.columns(layer, ["latents", "cosines", "neighbours"]);
    const seen = new Set();
    const entries = [];
    const order = [...latents.values.keys()].filter(() => cosines.width > 0)
      .sort((a, b) => cosines.values[b * cosines.width] - cosines.values[a * cosines.width]);
    for (const i of order) {
      const pair = [latents.values[i], row(neighbours, i)[0]];
      const key = [...pair].sort((a, b) => a - b).join();
      if (seen.has(key)) continue;
      seen.add(key);
      entries.push({ latent: pair[0], label: `${pair[0]} and ${pair[1]}`, value: digits(row(cosines, i)[0]) });
      if (entries.length === LISTED) break;
    }
    return { entries, note: "Pairs of decoder rows, sorted by cosine." };
  },
  async dead(layer) {
    const silent = (await source.columns(layer, ["silent"])).silent.values;
    const note = silent.length ? `${count(silent.length)} of ${count(page.layers[layer].num_latents)} latents fired on no token.` : "Every latent fired on some token.";
    return { entries: [...silent.subarray(0, LISTED)].map((latent) => ({ latent, label: latent, value: "" })), note };
  },
  found: async () => found,
};

async function showList(layer) {
  const { entries, note } = await LISTS[list](layer);
  if (layer !== shown.layer) return; // another layer was chosen meanwhile
  $("list").replaceChildren(...entries.map(({ latent, label, token, value }) => {
    const button = make("button", { type: "button" }, make("span", { textContent: label }));
    if (token !== undefined) button.append(make("span", { className: "token", textContent: token }));
    button.append(make("span", { textContent: value }));
    button.dataset.latent = latent;
    button.addEventListener("click", () => go(shown.layer, latent));
    return make("li", {}, button);
  }));
  $("list").dataset.query = list === "found" ? asked.query : "";
  $("list-note").textContent = note;
  document.querySelectorAll("[data-list]").forEach((tab) => {
    tab.setAttribute("aria-pressed", tab.dataset.list === list);
    tab.hidden = tab.dataset.list === "found" && asked.query.trim() === "";
  });
  markCurrent();
}

function markCurrent() {
  for (const button of $("list").querySelectorAll("button")) button.setAttribute("aria-current", Number(button.dataset.latent) === shown.latent);
}

async function choose(name) {
  list = name;
  await showList(shown.layer);
}

// ---- searching

// The newest query wins, whichever answer comes first.
let searches = 0;
async function search(field) {
  const [number, layer] = [++searches, shown.layer];
  if (field) Object.assign(asked, { query: field.value, of: field.id });
  for (const other of [$("query"), $("quote")]) if (other.id !== asked.of) other.value = "";
  asked.matches = null;
  const answer = asked.query.trim() === "" ? NONE : await (asked.of === "query" ? byToken : byContext)(layer, asked.query);
  if (number !== searches) return false;
  found = answer;
  asked.matches = answer.matches ?? null;
  return true;
}

// A token is meant if its text is the query, spaces at its ends and case aside; without one, tokens that begin so.
async function byToken(layer, text) {
  const query = text.trim().toLowerCase();
  const same = new Set();
  const alike = new Set();
  page.vocabulary.forEach((text, place) => {
    const plain = text.trim().toLowerCase();
    if (plain === query) same.add(place);
    else if (plain.startsWith(query)) alike.add(place);
  });
  const wanted = same.size ? same : alike;
  const { latents, favorites, shares, promoted, rises } = await source.columns(layer, ["latents", "favorites", "shares", "promoted", "rises"]);
  const hits = [];
  for (let i = 0; i < latents.values.length; i++) {
    let share = 0;
    let token = -1;
    row(favorites, i).forEach((favorite, j) => {
      if (!wanted.has(favorite)) return;
      share += row(shares, i)[j];
      if (token < 0) token = favorite;
    });
    const place = promoted ? row(promoted, i).findIndex((each) => wanted.has(each)) : -1;
    if (token < 0 && place < 0) continue;
    const rise = place < 0 ? 0 : row(rises, i)[place];
    const shownToken = token < 0 ? row(promoted, i)[place] : token;
    hits.push({ latent: latents.values[i], label: latents.values[i], token: visible(word(shownToken)), value: token < 0 ? `promotes ${digits(rise)}` : percent(share), share, rise });
  }
  hits.sort((a, b) => b.share - a.share || b.rise - a.rise);
  const note = hits.length ? `Sorted by the share of their firings on the token${page.has_lens ? ", then by how much they promote it" : ""}.` : "No latent of this layer has such a token on its page.";
  return { entries: hits.slice(0, LISTED), note };
}

// The whole text in small letters, and where each token of it begins. Sequences are apart.
const written_ = once(async () => {
  const { values, width } = await source.text();
  const small = page.vocabulary.map((token) => token.toLowerCase());
  const starts = new Uint32Array(values.length + 1);
  const pieces = [];
  let length = 0;
  for (let place = 0; place < values.length; place++) {
    if (place && place % width === 0) {
      pieces.push("\u0000");
      length += 1;
    }
    starts[place] = length;
    const token = small[values[place]];
    pieces.push(token);
    length += token.length;
  }
  starts[values.length] = length;
  return { letters: pieces.join(""), starts, width };
});

// Marks the tokens of every match, and the places whose window has a whole match in it.
function matchesOf({ letters, starts, width }, query) {
  const number = starts.length - 1;
  const matches = new Uint8Array(number);
  const changes = new Int32Array(number + 1);
  let token = 0;
  let total = 0;
  for (let at = letters.indexOf(query); at >= 0; at = letters.indexOf(query, at + 1)) {
    while (starts[token + 1] <= at) token += 1;
    let last = token;
    while (last + 1 < number && starts[last + 1] < at + query.length) last += 1;
    matches.fill(1, token, last + 1);
    const sequence = Math.floor(token / width) * width;
    const from = Math.max(last - page.after, sequence);
    const to = Math.min(token + page.before, sequence + width - 1);
    if (from <= to) {
      changes[from] += 1;
      changes[to + 1] -= 1;
    }
    total += 1;
  }
  const inside = new Uint8Array(number);
  for (let place = 0, open = 0; place < number; place++) {
    open += changes[place];
    if (open) inside[place] = 1;
  }
  return { matches, inside, total };
}

async function byContext(layer, text) {
  const [{ latents, places }, whole] = await Promise.all([source.columns(layer, ["latents", "places"]), written_()]);
  const { matches, inside, total } = matchesOf(whole, text.toLowerCase());
  const hits = [];
  for (let i = 0; i < latents.values.length; i++) {
    let [number, first, of] = [0, -1, 0];
    for (let j = 0; j < places.width; j++) {
      const place = places.values[i * places.width + j];
      if (place < 0) continue;
      of += 1;
      if (!inside[place]) continue;
      if (first < 0) first = j;
      number += 1;
    }
    if (number) hits.push({ latent: latents.values[i], label: latents.values[i], value: `${number} of ${of}`, number, first });
  }
  hits.sort((a, b) => b.number - a.number || a.first - b.first);
  const listed = hits.length > LISTED ? `; the first ${LISTED}` : "";
  const note = hits.length ? `${count(hits.length)} ${hits.length === 1 ? "latent" : "latents"}, sorted by the number of contexts that contain it${listed}.`
    : total ? "The report's text contains it, but no context of this layer's latents does." : "The report's text does not contain it.";
  return { entries: hits.slice(0, LISTED), note, matches };
}
