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
  // A part of a circuit: its panel is shown, its paths stay bright; chosen again, or Escape: as at the start.
  const open = part => {
    const circuit = part.closest(".circuit"), off = part.classList.contains("chosen");
    circuit.querySelectorAll(".node").forEach(node => node.classList.toggle("chosen", !off && node === part));
    circuit.querySelectorAll(".edge-group").forEach(edge =>
      edge.classList.toggle("on", edge.dataset.ends.split(" ").includes(part.dataset.opens)));
    circuit.querySelector(".graph").classList.toggle("focused", !off);
    circuit.querySelectorAll(".part").forEach((panel, i) => { panel.hidden = off ? i > 0 : panel.id !== part.dataset.opens; });
  };
  // What stands in data-tip is said beside the pointer, or beside what has the focus.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  const say = (element, x, y) => {
    tip.hidden = !element;
    if (!element) return;
    const [head, ...lines] = element.dataset.tip.split("\n"), name = document.createElement("b");
    name.textContent = head;
    tip.replaceChildren(name, lines.map(line => "\n" + line).join(""));
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = (y + 18 + tip.offsetHeight < innerHeight ? y + 18 : Math.max(4, y - 12 - tip.offsetHeight)) + "px";
  };
  const start = () => {
    drawVisible();
    document.body.append(tip);
    document.addEventListener("pointermove", event => say(event.target.closest?.("[data-tip]"), event.clientX, event.clientY));
    document.addEventListener("pointerdown", event => say(event.target.closest?.("[data-tip]"), event.clientX, event.clientY));
    document.addEventListener("scroll", () => say(null), true);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
    document.addEventListener("click", event => {
      const button = event.target.closest(".tabs > .bar > button");
      if (button) choose(button);
      const part = event.target.closest("[data-opens]");
      if (part) open(part);
    });
    document.addEventListener("keydown", event => {
      const part = event.target.closest?.("[data-opens]");
      if (part && (event.key === "Enter" || event.key === " ")) {
        event.preventDefault();
        open(part);
      }
      if (event.key === "Escape") document.querySelectorAll(".node.chosen").forEach(open);
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
