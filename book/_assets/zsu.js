// What is wider than its place scrolls: a shadow says so, and the keyboard reaches it, as in the theme's code and tables.
const WIDE = 'mjx-container[display="true"], figure, article pre, .cell_output .output, .pst-scrollable-table-container';

function shadows(wide) {
  const right = wide.scrollWidth - wide.clientWidth - wide.scrollLeft;
  wide.parentElement.classList.toggle("more-left", wide.scrollLeft > 1);
  wide.parentElement.classList.toggle("more-right", right > 1);
}

function reachWide() {
  for (const wide of document.querySelectorAll(WIDE)) {
    const scrolls = wide.scrollWidth > wide.clientWidth + 1 && getComputedStyle(wide).overflowX !== "visible";
    const framed = wide.parentElement.classList.contains("scrolls");
    if (scrolls && !framed) {
      const frame = document.createElement("div");
      frame.className = "scrolls";
      wide.replaceWith(frame);
      frame.append(wide);
      wide.addEventListener("scroll", () => shadows(wide), { passive: true });
    }
    if (scrolls) wide.tabIndex = 0;
    else if (framed) wide.removeAttribute("tabindex");
    if (scrolls || framed) shadows(wide);
  }
}
// Not every page has formulas.
addEventListener("load", () => Promise.resolve(window.MathJax?.startup?.promise).then(reachWide));
addEventListener("resize", reachWide);

// Paper shows what a screen folds.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
});

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
