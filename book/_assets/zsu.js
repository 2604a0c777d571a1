// A formula or figure wider than the screen scrolls: let the keyboard reach it, as the theme does for code and tables.
function reachWide() {
  for (const wide of document.querySelectorAll('mjx-container[display="true"], figure')) {
    if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
    else wide.removeAttribute("tabindex");
  }
}
// Not every page has formulas.
addEventListener("load", () => Promise.resolve(window.MathJax?.startup?.promise).then(reachWide));
addEventListener("resize", reachWide);

// On the page of slides the arrow keys go from one to the next.
addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const slides = [...document.querySelectorAll("#slides > section")];
  if (!step || !slides.length || event.target.matches("input, textarea, select") || event.altKey || event.ctrlKey) return;
  const above = slides.filter((slide) => slide.getBoundingClientRect().top < 100).length;  // seen, with the present one
  slides[Math.min(Math.max(above - 1 + step, 0), slides.length - 1)].scrollIntoView();
  event.stopPropagation();
  event.preventDefault();
}, true);
