// Draws every chart that is not in a closed panel, in the colours of the page, and again when the page turns dark.
(() => {
  const css = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const stops = name => css(name).split(/,\s*/).map((colour, i, all) => [i / (all.length - 1), colour]);
  // "@name" under a key that is about colour stands for the variable --name of page.css.
  const coloured = (value, key) => {
    if (Array.isArray(value)) return value.map(item => coloured(item, key));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, k)]));
    if (typeof value !== "string" || value[0] !== "@" || !/color/i.test(key)) return value;
    return key === "colorscale" ? stops(value.slice(1)) : css(value.slice(1));
  };
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]], showTips: false };
  const drawn = new Set();
  const draw = plot => {
    drawn.add(plot);
    const figure = coloured(JSON.parse(plot.nextElementSibling.textContent), "");
    figure.layout.font.family = getComputedStyle(document.body).fontFamily;
    Plotly.react(plot, figure.data, figure.layout, config);
  };
  // One chart in each turn of the event loop, so that the page can be scrolled meanwhile; those in closed panels wait.
  const drawVisible = () => {
    const next = [...document.querySelectorAll(".plot")].find(plot => !drawn.has(plot) && plot.offsetParent);
    if (!next) return;
    draw(next);
    setTimeout(drawVisible);
  };
  const choose = button => {
    const group = button.closest(".tabs");
    group.querySelectorAll(":scope > .bar > button").forEach(other => {
      const on = other === button;
      other.setAttribute("aria-selected", on);
      other.tabIndex = on ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = !on;
    });
    drawVisible();
  };
  const start = () => {
    drawVisible();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
    document.addEventListener("click", event => {
      const button = event.target.closest(".tabs > .bar > button");
      if (button) choose(button);
    });
    document.addEventListener("keydown", event => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const button = event.target.closest?.(".tabs > .bar > button");
      if (!step || !button) return;
      const all = [...button.parentElement.children];
      const next = all[(all.indexOf(button) + step + all.length) % all.length];
      next.focus();
      choose(next);
    });
  };
  window.mechStart = start;
})();
