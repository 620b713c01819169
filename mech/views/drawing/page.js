// What every page does: charts when they come into sight, in the colours of the page; panels, tips, tables as CSV, marks
// over pictures when they are shown, and the page of a head. No chart needs more than `Plotly`, nothing else needs it.
(() => {
  const root = document.documentElement;
  const css = name => getComputedStyle(root).getPropertyValue("--" + name).trim();
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
  // Large values lie in the page as gzip in base64.
  const unpack = text => new Response(new Blob([Uint8Array.from(atob(text), c => c.charCodeAt(0))])
    .stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const read = async script => JSON.parse("gzip" in script.dataset ? await unpack(script.textContent) : script.textContent);

  const drawn = new Map(), waiting = [];
  const draw = async plot => {
    const first = !drawn.has(plot);
    if (first) drawn.set(plot, await read(plot.nextElementSibling));
    const figure = coloured(drawn.get(plot), "");
    figure.layout.font.family = getComputedStyle(document.body).fontFamily;
    if (root.classList.contains("printing")) figure.layout.width = plot.clientWidth;
    Plotly.react(plot, figure.data, figure.layout, config);
    if (first && plot.closest("[data-heads]") && figure.data[0].type === "heatmap")
      plot.on("plotly_click", async ({ points: [{ x, y }] }) => {
        const setting = plot.closest("[data-heads]").dataset.heads;
        openHead(setting, (await headsOf(setting)).layers[y], x);
      });
  };
  // One chart in each turn of the event loop, so that the page can be scrolled meanwhile.
  const drawNext = async () => {
    if (waiting.length && !drawn.has(waiting[0])) await draw(waiting[0]);
    if (waiting.shift() && waiting.length) setTimeout(drawNext);
  };
  const drawSoon = plot => waiting.push(plot) === 1 && setTimeout(drawNext);
  // Pictures carry their marks in a template: a study has tens of thousands of them, of which few are ever looked at.
  const mark = stage => Promise.all([...stage.querySelectorAll(":scope > template")].map(async marks => {
    if ("gzip" in marks.dataset) marks.innerHTML = await unpack(marks.content.textContent);
    marks.replaceWith(marks.content);
    const figure = stage.closest("figure[data-most]");
    if (figure && root.classList.contains("without-sinks")) recolour(figure);
  }));
  // Sinks shown or hidden: all maps that know theirs are coloured anew on the scale that is left.
  const HEAT = css("heat").split(/,\s*/).map(colour => [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16)));
  const heat = strength => {
    const at = Math.min(Math.max(strength, 0), 1) * (HEAT.length - 1), i = Math.min(Math.floor(at), HEAT.length - 2);
    return `rgb(${HEAT[i].map((from, j) => Math.round(from + (HEAT[i + 1][j] - from) * (at - i)))})`;
  };
  const recolour = figure => {
    const without = root.classList.contains("without-sinks"), most = +(without ? figure.dataset.mostWithout : figure.dataset.most);
    figure.querySelectorAll(".stage.dim rect[data-tip]").forEach(rect => {
      const strength = rect.dataset.tip.match(/\d[\d.e+-]*/)[0] / most;
      rect.setAttribute("fill", heat(strength));
      rect.setAttribute("fill-opacity", strength < 0.02 || (without && rect.matches(".sink")) ? 0 : 0.85 * Math.min(1, strength + 0.1));
    });
  };
  const hideSinks = on => {
    root.classList.toggle("without-sinks", on);
    document.querySelectorAll(".hide-sinks").forEach(box => { box.checked = on; });
    document.querySelectorAll("figure[data-most]").forEach(recolour);
  };
  const whenSeen = act => new IntersectionObserver((entries, observer) => entries.forEach(entry => {
    if (!entry.isIntersecting) return;
    observer.unobserve(entry.target);
    act(entry.target);
  }), { rootMargin: "400px" });
  const marks = whenSeen(mark), plots = whenSeen(drawSoon);

  const choose = button => {
    button.closest(".tabs").querySelectorAll(":scope > .bar > button").forEach(other => {
      const on = other === button;
      other.setAttribute("aria-selected", on);
      other.tabIndex = on ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = !on;
    });
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

  // The page of a head, #head=SETTING/LAYER/HEAD: rows of the JSON of its setting, and its pictures where there are any.
  const make = (name, facts = {}, ...inner) => {
    const element = Object.assign(document.createElement(name), facts);
    element.append(...inner);
    return element;
  };
  const settings = new Map();
  const headsOf = async setting => {
    const source = document.getElementById("heads-" + setting);
    if (source && !settings.has(setting)) settings.set(setting, await read(source.nextElementSibling));
    return settings.get(setting);
  };
  const rounded = (value, digits) => value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1"); // no "-0.0"
  const number = (value, unit) => value == null ? "–" : unit === "%" ? rounded(100 * value, 1) + "%" : rounded(value, 3);
  const openHead = (setting, layer, head) => { location.hash = `head=${setting}/${layer}/${head}`; };
  const showHead = async () => {
    const dialog = document.getElementById("head"), asked = /^#head=(\d+)\/(\d+)\/(\d+)$/.exec(location.hash);
    if (!dialog) return;
    const [setting, layer, head] = asked ? asked.slice(1).map(Number) : [];
    const facts = asked && await headsOf(String(setting)), name = `L${layer}H${head}`;
    const at = facts ? facts.order.findIndex(([l, h]) => l === layer && h === head) : -1;
    if (at < 0) return dialog.open && dialog.close();
    const step = (label, to) => {
      const button = make("button", { type: "button", textContent: label, disabled: !facts.order[to] });
      button.addEventListener("click", () => openHead(setting, ...facts.order[to]));
      return button;
    };
    const rows = facts.columns.map(([label, unit, values, lows, highs]) => {
      const interval = lows && lows[at] != null ? ` [${number(lows[at], unit)}, ${number(highs[at], unit)}]` : "";
      return make("tr", {}, make("th", { textContent: label }), make("td", {},
        typeof values[at] === "string" ? values[at] : number(values[at], unit), make("small", { textContent: interval })));
    });
    const drawnIn = part => [...document.querySelectorAll(`#${part}-${setting} figure[data-head="${name}"]`)];
    const found = drawnIn("maps"), maps = (found.length ? found : drawnIn("tenths")).map(one => one.cloneNode(true));
    maps.forEach(one => one.querySelectorAll(".stage").forEach(mark));
    const close = make("button", { type: "button", textContent: "Close", className: "close", autofocus: true });
    close.addEventListener("click", () => dialog.close());
    dialog.replaceChildren(
      make("div", { className: "bar" }, step("← higher RAM", at - 1), step("lower RAM →", at + 1), close),
      make("h3", { textContent: `${name}, ${facts.name}` }),
      make("p", { className: "soft", textContent: `Rank ${at + 1} of ${facts.order.length} by RAM. ${facts.note}` }),
      make("table", { className: "record" }, make("tbody", {}, ...rows)),
      ...(facts.said[name] || []).map(text => make("p", { textContent: text })),
      make("h4", { textContent: "Where it attends" }),
      maps.length ? make("div", { className: "heads" }, ...maps) : make("p", { className: "soft", textContent: facts.elsewhere }));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  };

  // A table as CSV: "0.5 [0.4, 0.6]" becomes three columns, "50%" a number in a column that says so.
  const quoted = text => {
    const safe = /^[=+@\t\r]|^-(?![\d.])/.test(text) ? "'" + text : text; // a spreadsheet would run it as a formula
    return /[",\n]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  };
  const asCsv = table => {
    const told = cell => {
      const copy = cell.cloneNode(true);
      copy.querySelectorAll("br").forEach(line => line.replaceWith(" "));
      return (cell.dataset.csv ?? copy.textContent).replace(/\s+/g, " ").trim();
    };
    const lines = [...table.rows].map(row => [...row.cells].flatMap(cell => [told(cell), ...Array(cell.colSpan - 1).fill("")]));
    const split = /^(-?[\d.]+)(%?) \[(-?[\d.]+)%?, (-?[\d.]+)%?\]$/, n = table.tHead ? table.tHead.rows.length : 0;
    const columns = lines.at(-1).map((_, i) => lines.slice(n).some(line => split.test(line[i])));
    return lines.map((line, r) => line.flatMap((text, i) => {
      if (!columns[i]) return [text];
      const found = split.exec(text);
      return r < n ? (r === n - 1 ? [text, text + " low", text + " high"] : [text, "", ""]) : found ? [found[1] + found[2], found[3] + found[2], found[4] + found[2]] : [text, "", ""];
    }).map(quoted).join(",")).join("\r\n") + "\r\n";
  };
  const save = button => {
    const part = button.closest(".tabular"), link = make("a");
    const named = part.closest("details")?.querySelector("summary") || part.closest("section")?.querySelector("h2, h3") || document.querySelector("h1, h3");
    link.download = (named?.textContent || "table").toLowerCase().replace(/[^\p{L}\d]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) + ".csv";
    link.href = URL.createObjectURL(new Blob([asCsv(part.querySelector("table"))], { type: "text/csv" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  // What stands in data-tip is said beside the pointer.
  const tip = make("div", { className: "tip", hidden: true });
  const say = (element, x, y) => {
    tip.hidden = !element;
    if (!element) return;
    const [head, ...lines] = element.dataset.tip.split("\n");
    tip.replaceChildren(make("b", { textContent: head }), lines.map(line => "\n" + line).join(""));
    // What lies in the top layer is covered by nothing else on the page.
    (element.closest("dialog") || document.body).append(tip);
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = (y + 18 + tip.offsetHeight < innerHeight ? y + 18 : Math.max(4, y - 12 - tip.offsetHeight)) + "px";
  };
  const tipped = event => say(event.target.closest?.("[data-tip]"), event.clientX, event.clientY);

  // Printed in the colours of the day, as wide as a sheet.
  const redraw = () => [...drawn.keys()].forEach(draw);
  const printing = on => { root.classList.toggle("printing", on); redraw(); };
  const paper = root.classList.contains("paper"); // a figure has its size already
  if (!paper) {
    addEventListener("beforeprint", () => printing(true));
    addEventListener("afterprint", () => printing(false));
  }

  document.body.append(tip);
  document.addEventListener("pointermove", tipped);
  document.addEventListener("pointerdown", tipped);
  document.addEventListener("scroll", () => say(null), true);
  addEventListener("hashchange", showHead);
  document.getElementById("head")?.addEventListener("close", () => /^#head=/.test(location.hash) && history.replaceState(null, "", " "));
  document.addEventListener("click", event => {
    const button = event.target.closest(".tabs > .bar > button"), part = event.target.closest("[data-opens]");
    if (button) choose(button);
    if (part) open(part);
    if (event.target.matches(".csv")) save(event.target);
    if (event.target.matches("dialog")) event.target.close(); // beside it
  });
  document.addEventListener("change", event => event.target.matches(".hide-sinks") && hideSinks(event.target.checked));
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
  document.querySelectorAll(".stage").forEach(stage => paper ? mark(stage) : marks.observe(stage));
  showHead();

  // When plotly is there.
  window.mechUnpack = unpack;
  window.mechStart = () => {
    const all = [...document.querySelectorAll(".plot")], shown = () => all.filter(plot => plot.offsetParent);
    if (paper) shown().forEach(drawSoon);
    else all.forEach(plot => plots.observe(plot));
    // What stands open further down is drawn when there is nothing else to do: it is there when the page is printed.
    if (!paper && window.requestIdleCallback) setTimeout(() => requestIdleCallback(() => shown().forEach(drawSoon)), 2000);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  };
})();
