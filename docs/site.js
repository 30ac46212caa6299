// Repairs the theme's markup where axe-core finds errors (docs/tools/axe.py); mkdocs.yml names this file.
function repair() {
  document.querySelector(".md-search").setAttribute("aria-label", "Search");
  for (const nav of document.querySelectorAll(".md-code__nav")) {
    nav.setAttribute("role", "none"); // each would be a landmark of its own
  }
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) {
    table.tabIndex = 0; // so that keys scroll a wide table
  }
}

repair();
new MutationObserver(repair).observe(document.body, { childList: true, subtree: true });
