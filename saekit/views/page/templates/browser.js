// The feature browser: one layer and one latent at a time, which the address names as #layers.3/1234.
let shown = { layer: 0, latent: 0 };

function parseAddress() {
  const [hookpoint, latent] = decodeURIComponent(location.hash.slice(1)).split("/");
  const layer = page.layers.findIndex((each) => each.hookpoint === hookpoint);
  return layer < 0 || latent === undefined ? null : { layer, latent: latent === "" ? null : Number(latent) };
}

// Where a latent's row is, or the next one's; both for a page with a sample of the latents.
function placeOf(latents, latent) {
  let [low, high] = [0, latents.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (latents[middle] < latent) low = middle + 1;
    else high = middle;
  }
  return { place: low, exact: latents[low] === latent };
}

async function latentsOf(layer) {
  return (await source.columns(layer, ["latents"])).latents.values;
}

async function go(layer, latent, scroll = false) {
  try {
    const latents = await latentsOf(layer);
    if (latent === null) latent = latents[await densest(layer)];
    const changed = layer !== shown.layer || !$("feature").dataset.latent;
    shown = { layer, latent };
    history.replaceState(null, "", `#${page.layers[layer].hookpoint}/${latent}`);
    $("layer").selectedIndex = layer;
    $("latent").value = latent;
    $("latent").max = page.layers[layer].num_latents - 1;
    if (changed && list === "found") await search();
    const { place, exact } = placeOf(latents, latent);
    await showFeature(layer, latent, exact ? place : -1);
    if (changed) await showList(layer);
    markCurrent();
    if (scroll) $("features").scrollIntoView();
  } catch (error) {
    $("feature").replaceChildren(make("p", { className: "warning", textContent: error.message }));
    $("feature").setAttribute("aria-busy", "false");
  }
}

async function step(by) {
  const latents = await latentsOf(shown.layer);
  // A latent without a page has no row of its own: go on from where it would stand.
  let { place, exact } = placeOf(latents, shown.latent);
  if (by > 0 && !exact) place -= 1;
  await go(shown.layer, latents[(place + by + latents.length) % latents.length]);
}

async function otherLayer(by) {
  const layer = (shown.layer + by + page.layers.length) % page.layers.length;
  await go(layer, Math.min(shown.latent, page.layers[layer].num_latents - 1));
}

async function anyLatent() {
  const { latents, counts } = await source.columns(shown.layer, ["latents", "counts"]);
  // Never the one that is shown: a key that changes nothing looks broken.
  const others = [...latents.values.keys()].filter(
    (place) => counts.values[place] > 0 && latents.values[place] !== shown.latent,
  );
  if (others.length) await go(shown.layer, latents.values[others[Math.floor(Math.random() * others.length)]]);
}

// ---- what the reader does

async function typed(event) {
  if (!(await search(event.target))) return;
  await choose(event.target.value.trim() === "" ? "densest" : "found");
  if (asked.of === "quote") await go(shown.layer, shown.latent); // its contexts show the matches
}

for (const form of ["pick", "search"]) $(form).addEventListener("submit", (event) => event.preventDefault());
$("layer").addEventListener("change", () => otherLayer($("layer").selectedIndex - shown.layer));
$("latent").addEventListener("change", () => $("latent").value !== "" && go(shown.layer, Math.trunc(Number($("latent").value))));
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("random").addEventListener("click", anyLatent);
$("help").addEventListener("click", () => $("keys").showModal());
for (const field of ["query", "quote"]) $(field).addEventListener("input", typed);
document.querySelectorAll("[data-list]").forEach((tab) => tab.addEventListener("click", () => choose(tab.dataset.list)));

function focusOn(field) {
  $("features").scrollIntoView();
  $(field).focus();
}

const KEYS = {
  ArrowLeft: () => step(-1), k: () => step(-1), ArrowRight: () => step(1), j: () => step(1),
  "[": () => otherLayer(-1), "]": () => otherLayer(1), r: anyLatent, c: copyLink, t: switchTheme,
  "/": () => focusOn("query"), s: () => focusOn("quote"), "?": () => $("keys").showModal(),
};
document.addEventListener("keydown", (event) => {
  const inField = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape" && inField) event.target.blur();
  if (inField || event.ctrlKey || event.metaKey || event.altKey || $("keys").open || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

window.addEventListener("hashchange", () => {
  const address = parseAddress();
  if (address) go(address.layer, address.latent, true);
});

const address = parseAddress();
go(address?.layer ?? 0, address?.latent ?? null, address !== null).then(showCharts);
