// Figures come finished; only the theme's colors are put in here, and again when it changes.
const figures = JSON.parse(document.getElementById("figures").textContent);
const charts = [...document.querySelectorAll("[data-chart]")];

function themed() {
  const style = getComputedStyle(document.documentElement);
  const [ink, line, card, accent] = ["--ink", "--line", "--card", "--accent"].map((name) => style.getPropertyValue(name).trim());
  const clear = "rgba(0,0,0,0)";
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
  return { layout: { paper_bgcolor: clear, plot_bgcolor: clear, font: { color: ink, family: "system-ui, sans-serif", size: 12 },
    hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink } }, colorway: [accent] }, axis, ink };
}

function draw(element) {
  const { data, layout } = figures[element.dataset.chart];
  const theme = themed();
  const bars = data.map((trace) => (trace.type === "bar" ? { ...trace, error_y: { ...trace.error_y, color: theme.ink } } : trace));
  return Plotly.react(element, bars, { ...layout, ...theme.layout, xaxis: { ...layout.xaxis, ...theme.axis }, yaxis: { ...layout.yaxis, ...theme.axis } },
    { responsive: true, displaylogo: false, displayModeBar: false });
}

// Drawn when they come near the screen: the features are there at once, however many charts there are.
const drawn = new Set();
const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting || drawn.has(target)) continue;
    drawn.add(target);
    draw(target);
  }
}, { rootMargin: "400px" });
const watch = () => charts.forEach((element) => near.observe(element));

// A served page shows its first latent before it reads the charts' library, which takes longer than all the rest.
function showCharts() {
  if (window.Plotly) return watch();
  const library = make("script", { src: `${page.build}/plotly.js` });
  library.addEventListener("load", watch);
  document.head.append(library);
}

const darkSystem = matchMedia("(prefers-color-scheme: dark)");
let theme = null; // the reader's own choice, if there is one
function applyTheme() {
  document.documentElement.dataset.theme = theme ?? (darkSystem.matches ? "dark" : "light");
  drawn.forEach(draw);
}
function switchTheme() {
  theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  applyTheme();
}
darkSystem.addEventListener("change", applyTheme);
document.getElementById("theme").addEventListener("click", switchTheme);
applyTheme();
