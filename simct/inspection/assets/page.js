// One tooltip for all units, filled from their titles as plain text. Without this script the titles themselves are shown.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const units = [...document.querySelectorAll(".u")];
  let shown = null;
  for (const unit of units) {
    unit.dataset.tip = unit.title;
    unit.setAttribute("aria-label", unit.title);
    unit.removeAttribute("title");
  }
  // One stop for the tab key in each text; arrow keys move on from there.
  for (const cut of document.querySelectorAll(".cut")) {
    cut.querySelectorAll(".u").forEach((unit, i) => { unit.tabIndex = i ? -1 : 0; });
  }
  const hide = () => { tip.hidden = true; shown = null; };
  const show = (unit) => {
    if (unit === shown) return;
    shown = unit;
    tip.textContent = unit.dataset.tip;
    tip.hidden = false;
    const at = unit.getBoundingClientRect(), own = tip.getBoundingClientRect(), edge = 8;
    const left = Math.max(edge, Math.min(at.left, innerWidth - own.width - edge));
    const below = at.bottom + 6 + own.height <= innerHeight;
    const top = below ? at.bottom + 6 : Math.max(edge, at.top - own.height - 6);
    tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  };
  const unitOf = (event) => event.target.closest && event.target.closest(".u");
  document.addEventListener("pointerover", (event) => {
    const unit = unitOf(event);
    if (unit) show(unit); else if (!document.activeElement.classList.contains("u")) hide();
  });
  document.addEventListener("focusin", (event) => { const unit = unitOf(event); if (unit) show(unit); else hide(); });
  document.addEventListener("click", (event) => { const unit = unitOf(event); if (unit) { unit.focus(); show(unit); } else hide(); });
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const unit = document.activeElement.closest(".cut .u");
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!unit || !step || event.ctrlKey || event.altKey || event.metaKey) return;
    const among = [...unit.closest(".cut").querySelectorAll(".u")];
    const next = among[among.indexOf(unit) + step];
    if (!next) return;
    event.preventDefault();
    unit.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
})();
