// A formula wider than the screen scrolls: let the keyboard reach it, as the theme does for wide code and tables.
function reachWideFormulas() {
  for (const formula of document.querySelectorAll('mjx-container[display="true"]')) {
    if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
    else formula.removeAttribute("tabindex");
  }
}
addEventListener("load", () => window.MathJax?.startup?.promise?.then(reachWideFormulas));
addEventListener("resize", reachWideFormulas);
