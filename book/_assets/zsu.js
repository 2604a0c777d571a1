// A formula wider than the screen scrolls: let the keyboard reach it, as the theme does for wide code and tables.
function reachWideFormulas() {
  for (const formula of document.querySelectorAll('mjx-container[display="true"]')) {
    if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
    else formula.removeAttribute("tabindex");
  }
}
addEventListener("load", () => window.MathJax?.startup?.promise?.then(reachWideFormulas));
addEventListener("resize", reachWideFormulas);

// On the page of slides the arrow keys go from one to the next.
addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const slides = [...document.querySelectorAll("#slides > section")];
  if (!step || !slides.length || event.target.matches("input, textarea, select") || event.altKey || event.ctrlKey) return;
  const above = slides.filter((slide) => slide.getBoundingClientRect().top < 20).length;  // seen, the present one included
  const next = slides[above - 1 + step] ?? slides[0];
  next.scrollIntoView();
  event.stopPropagation();
  event.preventDefault();
}, true);
