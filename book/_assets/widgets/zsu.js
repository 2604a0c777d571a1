// Loaded before embed.js, on pages that have a widget.

// html-manager 1.0.15 calls MathJax.Hub.Queue, which MathJax 3 lacks (jupyter-widgets/ipywidgets#3829).
addEventListener("DOMContentLoaded", () => { if (window.MathJax) MathJax.Hub = { Queue() {} }; });

// Its schema check warns about html-manager's own schema, which no page can mend. Other warnings pass.
const warn = console.warn;
console.warn = (...words) => { if (!String(words[0]).startsWith("strict mode: use allowUnionTypes")) warn(...words); };

// A noUiSlider handle has no name and announces an index (leongersen/noUiSlider#1019): give it the label and the readout.
function nameSliders() {
  for (const slider of document.querySelectorAll(".widget-slider")) {
    const handle = slider.querySelector(".noUi-handle");
    const label = slider.querySelector(".widget-label")?.textContent;
    const value = slider.querySelector(".widget-readout")?.textContent;
    if (handle && label && handle.getAttribute("aria-label") !== label) handle.setAttribute("aria-label", label);
    if (handle && value && handle.getAttribute("aria-valuetext") !== value) handle.setAttribute("aria-valuetext", value);
  }
}
addEventListener("load", () => new MutationObserver(nameSliders).observe(document.body, {
  childList: true, subtree: true, characterData: true, attributes: true, attributeFilter: ["aria-valuetext"],
}));
